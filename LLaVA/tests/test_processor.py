"""Prompts and pictures to model inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from tiny_llava import TinySizes, make_image, make_liuhaotian, make_llava_hf
from tiny_tokenizer import tokenizer_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llava import LlavaProcessor, UserError, load_processor
from llava.processor import IMAGE_TOKEN

COUNT = TinySizes().image_tokens
PIECES = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model())


@pytest.fixture(scope="module", params=["liuhaotian", "llava-hf"])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    make = make_liuhaotian if request.param == "liuhaotian" else make_llava_hf
    return load_processor(make(tmp_path_factory.mktemp("processor") / "model"))


def expected(processor: LlavaProcessor, prompt: str) -> list[int]:
    """LLaVA's own way: sentencepiece on each piece, one begin id, the picture in between."""
    ids = [1]
    for number, piece in enumerate(prompt.split(IMAGE_TOKEN)):
        ids += ([processor.image_token_id] * COUNT if number else []) + PIECES.encode(piece)
    return ids


@pytest.mark.parametrize(
    "prompt",
    [
        " USER: Name two rivers. ASSISTANT:",
        "USER: <image>\nHow many shapes? ASSISTANT:",
        "Here is my picture: <image>\nTell me about its colours.",
        "<image>",
        "<image><image>",
        "<image> <image>\n and <image>",
        "  two spaces <image>  two spaces",
        "",
    ],
)
def test_piece_by_piece(processor: LlavaProcessor, prompt: str) -> None:
    images = [make_image(seed=seed) for seed in range(prompt.count(IMAGE_TOKEN))]
    inputs = processor(text=prompt, images=images or None)
    assert inputs["input_ids"].tolist() == [expected(processor, prompt)]
    assert inputs["attention_mask"].tolist() == [[1] * inputs["input_ids"].shape[1]]
    assert ("pixel_values" in inputs) == bool(images)
    if images:
        assert inputs["pixel_values"].shape == (len(images), 3, 56, 56)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == COUNT * len(images)


def test_batch_is_padded_left_and_padding_is_no_picture(processor: LlavaProcessor) -> None:
    prompts = ["short", "USER: <image>\nHow many shapes?", "<image> and <image>"]
    images = [make_image(seed=seed) for seed in range(3)]
    batch = processor(text=prompts, images=images)
    for row, (prompt, count) in enumerate(zip(prompts, (0, 1, 2), strict=True)):
        ids, mask = batch["input_ids"][row], batch["attention_mask"][row]
        own = expected(processor, prompt)
        assert ids[-len(own) :].tolist() == own and mask.tolist() == [0] * (len(ids) - len(own)) + [1] * len(own)
        assert int((ids == processor.image_token_id).sum()) == count * COUNT
    single = processor(text=prompts[1], images=images[0])
    assert torch.equal(batch["pixel_values"][:1], single["pixel_values"])


@pytest.mark.parametrize("literal", ["<unk>", "a <unk> b", "<unk></s>USER: <unk>", "<s> and </s> and <unk>"])
def test_literal_special_tokens_make_no_picture(processor: LlavaProcessor, literal: str) -> None:
    ids = processor(text=f"{literal} <image>", images=make_image())["input_ids"][0]
    assert int((ids == processor.image_token_id).sum()) == COUNT
    text_ids = processor(text=literal)["input_ids"][0]
    assert processor.image_token_id not in text_ids.tolist()


def test_unk_in_a_prompt_is_plain_text(tmp_path: Path) -> None:
    processor = load_processor(make_liuhaotian(tmp_path / "model"))
    assert processor.image_token_id == 0
    assert processor.encode("a <unk> b") == [1, *PIECES.encode("a <unk> b")]
    assert processor.encode("red</s>") == [1, *PIECES.encode("red"), 2]
    assert processor.decode(processor.encode("a <unk> b"), skip_special_tokens=True) == "a <unk> b"


@pytest.mark.parametrize(
    "prompt",
    [
        "USER: <image>\nHow many shapes?",
        "  two spaces <image>  two",
        "a <unk> b</s>USER: x",
        "<image><image>",
        "",
        "ü 日🦙",
    ],
)
def test_each_id_stands_for_a_place_in_the_prompt(processor: LlavaProcessor, prompt: str) -> None:
    ids, spans = processor.encode_with_spans(prompt)
    assert ids == processor.encode(prompt) and len(spans) == len(ids) and spans[0] == (0, 0)
    assert spans == sorted(spans) and all(0 <= start <= end <= len(prompt) for start, end in spans)
    for index, (start, end) in zip(ids[1:], spans[1:], strict=True):
        shown = processor.tokenizer.convert_ids_to_tokens(index)
        if index == processor.image_token_id:
            assert prompt[start:end] == IMAGE_TOKEN
        elif shown != "\u2581" and not shown.startswith("<0x"):
            assert prompt[start:end].strip(" ") == shown.replace("\u2581", "")
    covered = {place for start, end in spans for place in range(start, end)}
    assert all(place in covered for place, character in enumerate(prompt) if character != " ")


@pytest.mark.parametrize(("marks", "pictures"), [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_marks_and_pictures_must_agree(processor: LlavaProcessor, marks: int, pictures: int) -> None:
    images = [make_image()] * pictures
    with pytest.raises(UserError, match=rf"{marks} <image> mark\(s\), but {pictures} picture\(s\)"):
        processor(text=IMAGE_TOKEN * marks + "text", images=images or None)


def test_pictures_may_be_files(processor: LlavaProcessor, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a.png")
    from_file = processor(text="<image>", images=tmp_path / "a.png")
    assert torch.equal(from_file["pixel_values"], processor(text="<image>", images=[image])["pixel_values"])
    with pytest.raises(UserError, match=r"picture not found.*b\.png"):
        processor(text="<image>", images=str(tmp_path / "b.png"))


def test_border_has_the_mean_colour(processor: LlavaProcessor) -> None:
    pixels = processor(text="<image>", images=Image.new("RGB", (56, 20), (255, 255, 255)))["pixel_values"][0]
    assert pixels[:, 0].abs().max() < 0.02  # the mean, up to 1/255 of rounding
    assert pixels[:, 28].min() > 1


def test_aspect_of_the_config_rules(tmp_path: Path) -> None:
    wide = Image.new("RGB", (112, 56), (255, 255, 255))
    for aspect, padded in [("pad", True), ("square", False), (None, False)]:
        folder = make_liuhaotian(tmp_path / str(aspect), config_changes={"image_aspect_ratio": aspect})
        pixels = load_processor(folder)(text="<image>", images=wide)["pixel_values"][0]
        assert (bool(pixels[:, 0].abs().max() < 0.02)) == padded
    with pytest.raises(UserError, match="too long for its width"):
        load_processor(folder)(text="<image>", images=Image.new("RGB", (5000, 1)))


def test_chat_prompt(processor: LlavaProcessor) -> None:
    prompt = processor.chat_prompt("What is this?", num_images=2, system="")
    assert prompt == " USER: <image>\n<image>\nWhat is this? ASSISTANT:"
    history = [("<image>\nWho?", "A cat.")]
    assert processor.chat_prompt("And <image>?", 1, history, "S", "llava_v1") == (
        "S USER: <image>\nWho? ASSISTANT: A cat.</s>USER: And <image>? ASSISTANT:"
    )
    assert processor.chat_prompt("Hi").startswith("A chat between a curious user")
    assert processor.chat_prompt("Hi", template="llava_v1").startswith("A chat between a curious human")
    with pytest.raises(UserError, match=r"1 <image> mark\(s\), but 2 picture\(s\) belong"):
        processor.chat_prompt("<image>?", num_images=2)


def test_end_token_of_the_template_is_one_id(processor: LlavaProcessor) -> None:
    ids = processor.encode(processor.chat_prompt("b", history=[("a", "red")], system=""))
    assert ids.count(2) == 1


def test_decode(processor: LlavaProcessor) -> None:
    ids = processor.encode("How many shapes?")
    assert processor.decode([*ids, 2], skip_special_tokens=True) == "How many shapes?"
    assert processor.batch_decode([ids, [*ids, 2]], skip_special_tokens=True) == ["How many shapes?"] * 2
    assert "</s>" in processor.decode([*ids, 2])


def test_answers_end_with_the_models_own_token_where_the_vocabulary_lacks_vicunas(processor: LlavaProcessor) -> None:
    """ "</s>" would be read in pieces, and "</" begins many texts."""
    letters = {letter: number for number, letter in enumerate(map(chr, range(32, 127)))}
    backend = Tokenizer(BPE({**letters, "<|end|>": 95, "<image>": 96}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    other = LlavaProcessor(tokenizer, processor.image_processor, 96, COUNT)
    prompt = other.chat_prompt("b", history=[("q", "a")], system="s")
    assert prompt == "s USER: q ASSISTANT: a<|end|>USER: b ASSISTANT:" and other.encode(prompt).count(95) == 1
    written = processor.chat_prompt("b", history=[("q", "a")], system="s")
    assert written == "s USER: q ASSISTANT: a</s>USER: b ASSISTANT:"

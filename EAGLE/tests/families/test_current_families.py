"""Today's families on tiny random models: exact, with the masks of training, and trainable."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from corpus_support import turns
from packaging.version import Version
from tiny_draft import make_draft
from tiny_families import ALL_MAKERS, FAMILY_MAKERS
from tiny_llava import make_image
from torch._dynamo.utils import counters
from transformers.video_utils import VideoMetadata

from eagle import MSDModel, TreeConfig, attention
from eagle.conversations import read_conversation
from eagle.drafts.checkpoint import load_draft
from eagle.families import family_named, load_target, template_of
from eagle.families.base import TOKEN_TYPES
from eagle.families.template import join_images
from llava.errors import UserError

MAKERS = {name: make for name, make in FAMILY_MAKERS.items() if not name.startswith("qwen3_5")}
TREES = [TreeConfig(5, 10, 60), TreeConfig(2, 2, 6)]
SIZES = [(50, 34), (112, 30), (64, 100)]
WORDS = [
    "which",
    "of",
    "these",
    "shapes",
    "can",
    "you",
    "count",
    "and",
    "what",
    "is",
    "the",
    "sum",
    "of",
    "red",
    "green",
    "blue",
    "numbers",
    "here",
]
ENDS = {
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "gemma4_unified": "<turn|>",
    "mistral3": "</s>",
    "paddleocr_vl": "</s>",
}
PICTURES_ONLY = ("gemma3", "mistral3", "paddleocr_vl")
VISION = "<|vision_start|><|video_pad|><|vision_end|>"
THOUGHTS = {"glm46v": "<think></think>\n"}


def load_pair(name: str, folder: Path) -> MSDModel:
    """A tiny base of `ALL_MAKERS` with a draft that is right now and then."""
    skip_if_missing(name.partition("-")[0])
    target = load_target(ALL_MAKERS[name](folder / "base"), dtype=torch.float32)
    target.model.generation_config.eos_token_id = None
    changes: dict[str, Any] = {}
    if "qwen3" in name:
        rope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
        changes = {"msd": {"positions": "mrope"}, "rope_scaling": rope}
    draft = make_draft(folder / "draft", target, agree=1.0, head_dim=8, **changes)
    return MSDModel(target, load_draft(draft, dtype=torch.float32), tree=TREES[0])


VARIANTS = ("gemma4_unified", "glm46v", "glm_ocr")
PAIRS = [
    pytest.param(name, marks=pytest.mark.slow if name in VARIANTS or "-" in name or "moe" in name else [])
    for name in MAKERS
]


@pytest.fixture(scope="module", params=PAIRS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    return load_pair(request.param, tmp_path_factory.mktemp(request.param))


def skip_if_missing(family: str) -> None:
    """Skips the test if the installed transformers does not have the family's models."""
    try:
        family_named(family).target_class()
        old = family == "paddleocr_vl" and Version(transformers.__version__) < Version("5.19")
    except ImportError:
        old = True
    if old:  # PaddleOCR-VL's config class refused its own tie_word_embeddings
        pytest.skip(f"transformers {transformers.__version__} does not have {family}")


def pictures(count: int, first: int = 0) -> list[Any]:
    return [make_image(width=w, height=h, seed=i) for i, (w, h) in enumerate((SIZES * 2)[first : first + count])]


def asked(model: MSDModel, question: str, count: int = 0, first: int = 0) -> dict[str, Any]:
    return model.target.prepare(model.target.chat_prompt(question, count), pictures(count, first))


def check(model: MSDModel, inputs: dict[str, Any], length: int = 30, **settings: Any) -> list[int]:
    """MSD's answer is that of transformers; returns the accepted lengths."""
    expected = model.target.model.generate(**inputs, max_new_tokens=length, do_sample=False)
    output = model.generate(**inputs, max_new_tokens=length, temperature=0.0, **settings)
    assert torch.equal(output.sequences, expected)
    return output.stats.accept_lengths


@pytest.mark.parametrize("tree", [TREES[0], pytest.param(TREES[1], marks=pytest.mark.slow)], ids=str)
def test_any_number_of_pictures(model: MSDModel, tree: TreeConfig) -> None:
    accepted = []
    for count in (0, 1, 2, 3):
        accepted += check(model, asked(model, "Which of these can you count?", count), tree=tree)
    if tree.total_tokens == 60:
        assert max(accepted) > 0


def test_the_picture_matters(model: MSDModel) -> None:
    """Otherwise equality above would say nothing about pictures."""
    first, second = (model.target.prefill(asked(model, "What?", 1, index)).hidden[0, -1] for index in (0, 2))
    assert (first - second).norm() > 1e-3 * first.norm()


def test_attention_in_two_parts_gives_the_same(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of each family are handed what it needs."""
    real, calls = attention.two_part_attention, []
    monkeypatch.setattr(attention, "two_part_attention", lambda *given: (calls.append(given[4]), real(*given))[1])
    parts = MSDModel(model.target, model.draft, TREES[1], tree_attention="two-part")
    inputs = asked(model, "Which of these can you count?", 2)
    check(parts, inputs, length=12)
    assert calls and min(calls) >= inputs["input_ids"].shape[1]


@pytest.mark.slow
def test_compiled_parts_give_the_same(model: MSDModel) -> None:
    torch._dynamo.reset()
    compiled = MSDModel(model.target, model.draft, TREES[1], compile="eager")
    compiled.warm_up(progress=False, batch_sizes=[1, 3])
    before = counters["stats"]["unique_graphs"]
    for count in (0, 2):
        check(compiled, asked(model, "Which of these can you count? " * 4, count), length=40)
    questions = [("Hi", 0), ("Which of these shapes can you count? " * 3, 1), ("And?", 2)]
    prompts = [model.target.chat_prompt(question, count) for question, count in questions]
    batch = {**model.target.prepare(prompts, pictures(3)), "temperature": 0.0, "max_new_tokens": 40}
    for settings in ({}, {"repetition_penalty": 1.2}, {"use_msd": False}):  # whole cycles, parts, plain steps
        assert compiled.generate(**batch, **settings).tokens == model.generate(**batch, **settings).tokens
    assert counters["stats"]["unique_graphs"] == before


def test_one_begin_token(model: MSDModel) -> None:
    """Where the template writes it, the tokenizer does not add another; in training neither."""
    begin = model.tokenizer.bos_token_id
    if begin is None:
        pytest.skip("the family has none")
    prompt = model.target.chat_prompt("What?")
    assert model.tokenizer(prompt)["input_ids"].count(begin) == 2  # what would be
    assert model.target.prepare(prompt)["input_ids"][0].tolist().count(begin) == 1
    assert template_of(model.target).encode(prompt, []).input_ids.count(begin) == 1


def test_through_generate(model: MSDModel) -> None:
    for count in (0, 1):
        inputs = asked(model, "Which?", count)
        settings = {"max_new_tokens": 20, "do_sample": False}
        expected = model.target.model.generate(**inputs, **settings)
        assert torch.equal(model.target.model.generate(**inputs, **settings, custom_generate=model), expected)


def test_a_batch_is_as_if_alone(model: MSDModel) -> None:
    questions = [("Hi", 0), ("Which of these shapes can you count? " * 3, 1), ("And?", 2)]
    prompts = [model.target.chat_prompt(question, count) for question, count in questions]
    batch = model.target.prepare(prompts, pictures(3))
    output = model.generate(**batch, max_new_tokens=25, temperature=0.0, tree=TREES[1])
    for index, (prompt, own) in enumerate(zip(prompts, ([], pictures(1), pictures(2, 1)), strict=True)):
        if index == 2:  # the seed of a picture is its place
            own = pictures(3)[1:]
        alone = model.target.prepare(prompt, own)
        expected = model.target.model.generate(**alone, max_new_tokens=25, do_sample=False)
        assert output.tokens[index] == expected[0, alone["input_ids"].shape[1] :].tolist()


def test_one_seed_one_answer(model: MSDModel) -> None:
    inputs = asked(model, "Which?", 1)
    settings = {"max_new_tokens": 25, "temperature": 1.0, "seed": 3}
    plain = MSDModel(model.target, None).generate(**inputs, **settings)
    assert model.generate(**inputs, **settings).tokens == plain.tokens


def test_hidden_states_of_padded_prompts(model: MSDModel) -> None:
    """As data generation reads them: a batch padded on the right gives what each prompt gives alone."""
    template = template_of(model.target)
    single = [asked(model, "Which of these?", 2), asked(model, "Hi", 1, 2)]
    longest = max(one["input_ids"].shape[1] for one in single)
    ids, mask = (
        torch.cat([torch.nn.functional.pad(one[name], (0, longest - one[name].shape[1])) for one in single])
        for name in ("input_ids", "attention_mask")
    )
    images = [{name: one[name] for name in template.image_inputs} for one in single]
    together = model.target.prefill({"input_ids": ids, "attention_mask": mask, **join_images(images)})
    for index, own in enumerate(single):
        expected = model.target.prefill(own)
        count = own["input_ids"].shape[1]
        assert torch.allclose(together.hidden[index, :count], expected.hidden[0], atol=1e-4)
        assert torch.equal(together.image_mask[index, :count], expected.image_mask[0])


ROWS: list[tuple[dict[str, Any], list[str]]] = [
    ({"conversations": turns("Name two rivers.", "The Nile.", "And?", "The Rhine.")}, ["The Nile.", "The Rhine."]),
    ({"conversations": turns("<image>\nWhat colours?", "Red.", "More?", "No."), "image": "0.png"}, ["Red.", "No."]),
    ({"conversations": turns("<image> and <image>?", "Both"), "image": ["1.png", "2.png"]}, ["Both"]),
    ({"conversations": [{"from": "system", "value": "Be brief."}, *turns("q", "a")]}, ["a"]),
]


@pytest.mark.parametrize(("row", "answers"), ROWS, ids=["text", "picture", "two pictures", "system"])
def test_what_is_learnt_and_what_is_asked(
    model: MSDModel, tmp_path: Path, row: dict[str, Any], answers: list[str]
) -> None:
    target, template = model.target, template_of(model.target)
    for index, picture in enumerate(pictures(3)):
        picture.save(tmp_path / f"{index}.png")
    conversation = read_conversation({"id": "r", **row}, 0)
    prepared = template.prepare(conversation, tmp_path, 1000)
    inputs = target.prepare(
        "".join(part.text for part in template.segments(conversation)),
        [tmp_path / name for name in conversation.images],
    )
    assert torch.equal(inputs["input_ids"][0], prepared.input_ids)
    for name in template.image_inputs if conversation.images else ():
        assert torch.equal(inputs[name], prepared.images[name])
    learnt = target.tokenizer.decode(prepared.input_ids[prepared.loss_mask])
    end = ENDS.get(target.family, "<|endoftext|>" if "glm" in target.family else "<|im_end|>")
    thought = THOUGHTS.get(target.family, "")
    assert learnt.replace(" ", "") == "".join(thought + answer + end for answer in answers).replace(" ", "")


def video_prompt(model: MSDModel, question: str) -> str:
    family = model.target.family
    mark = {"glm": "<|begin_of_video|><|video|><|end_of_video|>", "gem": "<|video|>", "qwe": VISION}.get(family[:3])
    return f"user {mark or '<video>'} {question} assistant"


def with_videos(model: MSDModel, prompts: list[str], images: list[Any], count: int = 1) -> dict[str, Any]:
    """Model inputs of prompts with ``count`` videos of four frames."""
    random = np.random.default_rng(0)
    videos = [random.integers(0, 255, (4, 56, 56 + 28 * number, 3), dtype=np.uint8) for number in range(count)]
    known = [VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3]) for _ in videos]
    return model.target.prepare(prompts, images, videos=videos, video_metadata=known, do_sample_frames=False)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_videos(model: MSDModel, tree: TreeConfig) -> None:
    target = model.target
    if target.family in PICTURES_ONLY:
        with pytest.raises(UserError, match=f"{target.family} models do not read videos"):
            with_videos(model, ["What?"], [])
        if hasattr(target.config, "video_token_id"):  # to the stock model it is text
            check(model, {"input_ids": torch.tensor([[5, target.config.video_token_id, 6, 7]])}, tree=tree)
        return
    inputs = with_videos(model, [video_prompt(model, "What happens?")], [])
    encode = getattr(target.model.model, "get_video_features", None)
    if target.family == "llava_onevision" and "pixel_values" in signature(encode).parameters:
        with pytest.raises(UserError, match="in parts"):
            model.generate(**inputs, max_new_tokens=2)
        return
    check(model, inputs, tree=tree)
    changed = dict(inputs)
    name = next(name for name in ("pixel_values_videos", "pixel_values") if name in inputs)
    changed[name] = -inputs[name]
    assert not torch.equal(target.prefill(changed).hidden, target.prefill(inputs).hidden)


def test_videos_and_pictures_in_a_batch(model: MSDModel) -> None:
    """GLM's have the same id. transformers refuses both in one prompt, and so does the engine."""
    if "glm" not in model.target.family:
        pytest.skip("other families are asked above")
    texts = [model.target.chat_prompt("What?", 1), *(video_prompt(model, text) for text in ("And what happens?", "Hm"))]
    batch = with_videos(model, texts, pictures(1), 2)
    output = model.generate(**batch, max_new_tokens=20, temperature=0.0)
    for index, text in enumerate(texts):
        alone = {name: batch[name][index : index + 1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        if index == 0:
            alone |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        else:
            split = batch["pixel_values_videos"].split(batch["video_grid_thw"].prod(dim=-1).tolist())
            alone["pixel_values_videos"] = split[index - 1]
            alone["video_grid_thw"] = batch["video_grid_thw"][index - 1 : index]
        expected = model.target.model.generate(**alone, max_new_tokens=20, do_sample=False)
        assert output.tokens[index] == expected[0, alone["input_ids"].shape[1] :].tolist(), text
    both = with_videos(model, [texts[0] + texts[1]], pictures(1))
    with pytest.raises(ValueError, match="do not match"):
        model.target.model.generate(**both, max_new_tokens=2)
    with pytest.raises(UserError, match="pictures and videos in one prompt"):
        model.generate(**both, max_new_tokens=2)


def test_audio_is_refused(model: MSDModel) -> None:
    if "gemma4" not in model.target.family:
        pytest.skip("no audio")
    inputs = asked(model, "What?")
    inputs["input_ids"][0, 5] = model.target.config.audio_token_id
    with pytest.raises(UserError, match="audio"):
        model.generate(**inputs, max_new_tokens=2)


def test_the_token_of_a_picture_in_an_answer(model: MSDModel) -> None:
    """Gemma 4 reads it as padding."""
    target, inputs = model.target, asked(model, "What?")
    count = inputs["input_ids"].shape[1]
    token = torch.tensor([[target.config.image_token_id]])
    cache = target.new_cache(1, count + 1)
    list(target.prefill_each(inputs, cache))
    hidden = target.verify(token, torch.tensor([[count]]), None, cache)
    expected = target.model.model(input_ids=torch.cat([inputs["input_ids"], token], dim=1), use_cache=False)
    assert torch.allclose(hidden[:, 0], expected.last_hidden_state[:, -1], atol=1e-4)


@pytest.mark.parametrize("through", ["engine", "custom_generate"])
def test_token_types_that_call_a_picture_text(model: MSDModel, through: str) -> None:
    """transformers' own `generate` then reads its tokens as text, and the engine does not."""
    inputs = asked(model, "Which?", 1)
    types = {name: torch.zeros_like(inputs[name]) for name in TOKEN_TYPES if name in inputs}
    if not types:
        pytest.skip("the family has none")
    settings = {"max_new_tokens": 2, "do_sample": False}
    with pytest.raises(UserError, match=r"of your own|as text"):
        if through == "engine":
            model.generate(**inputs | types, **settings)
        else:
            model.target.model.generate(**inputs | types, **settings, custom_generate=model)


def test_too_many_or_too_few_pictures(model: MSDModel) -> None:
    inputs = asked(model, "What?", 2)
    for name in template_of(model.target).image_inputs:
        inputs.pop(name)
    with pytest.raises(UserError, match="image tokens"):
        model.generate(**inputs, max_new_tokens=2, temperature=0.0)


@pytest.mark.by_hand
@pytest.mark.parametrize("name", ALL_MAKERS)
def test_three_hundred_prompts(name: str, tmp_path: Path) -> None:
    """Random words with and without pictures, trees of several shapes, alone and in ragged batches of three."""
    model = load_pair(name, tmp_path)
    random = np.random.default_rng(0)
    trees = [*TREES, TreeConfig(1, 4, 4), TreeConfig(4, 1, 5), TreeConfig(3, 8, 25)]
    window = model.target.layers.window or 0
    accepted, past, with_pictures = 0, 0, 0
    for number in range(100):
        texts, images, answers = [], [], []
        for short in (True, False, False):
            question = " ".join(random.choice(WORDS, int(random.integers(1, 3 if short else 40))))
            own = [] if short else pictures(int(random.integers(0, 4)), int(random.integers(0, 3)))
            texts.append(model.target.chat_prompt(question, len(own)))
            images += own
            inputs = model.target.prepare(texts[-1], own)
            expected = model.target.model.generate(**inputs, max_new_tokens=20, do_sample=False)
            output = model.generate(**inputs, max_new_tokens=20, temperature=0.0, tree=trees[number % len(trees)])
            assert torch.equal(output.sequences, expected)
            answers.append(expected[0, inputs["input_ids"].shape[1] :].tolist())
            accepted += sum(output.stats.accept_lengths)
            past += inputs["input_ids"].shape[1] > window
            with_pictures += bool(own)
        batch = model.target.prepare(texts, images)
        output = model.generate(**batch, max_new_tokens=20, temperature=0.0, tree=trees[(number + 1) % len(trees)])
        assert output.tokens == answers
    print(f"300 prompts: {with_pictures} with pictures, {past} longer than the window, {accepted} accepted tokens")
    assert accepted > 0 and 0 < with_pictures < 300
    assert past == 300 if not window else 100 <= past < 300

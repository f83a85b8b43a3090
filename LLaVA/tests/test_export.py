"""A base in the liuhaotian layout written in transformers' layout: same ids, same tensors, same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from repository import REPO
from tiny_llava import make_image, make_liuhaotian, make_llava_hf
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava
from llava.errors import UserError
from llava.export import export_pretrained

POCKET = REPO / "pocket" / "llava"
PICTURES = sorted((REPO / "pocket" / "data" / "images" / "heldout").glob("*.png"))[:2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_pretrained(POCKET, tmp_path_factory.mktemp("export") / "pocket")


def user(text: str, pictures: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_answers_of_transformers_alone(exported: Path, pictures: int) -> None:
    model, processor = llava.load_pretrained(POCKET, dtype=torch.float32)
    prompt = processor.chat_prompt("What is in the picture?", num_images=pictures)
    inputs = processor(text=prompt, images=PICTURES[:pictures] or None)
    wanted = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    stock = AutoProcessor.from_pretrained(exported)
    content = [{"type": "image", "path": str(path)} for path in PICTURES[:pictures]]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is in the picture?"}]}]
    given = stock.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    other = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    assert given["input_ids"].tolist() == inputs["input_ids"].tolist()
    answer = other.generate(
        **{name: given[name] for name in inputs if name in given}, max_new_tokens=16, do_sample=False
    )
    assert answer.tolist() == wanted.tolist()


def test_tensors_and_dtype_are_the_checkpoints_own(exported: Path) -> None:
    own = llava.load_model(POCKET, dtype=torch.bfloat16).state_dict()
    written = LlavaForConditionalGeneration.from_pretrained(exported, dtype="auto").state_dict()
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name]) and written[name].dtype == torch.bfloat16 for name in own)


@pytest.mark.parametrize("kind", ["pocket", "legacy"])  # the tiny one's tokenizer has spaces behind special tokens
def test_conversations_have_the_ids_of_the_original(exported: Path, tmp_path: Path, kind: str) -> None:
    base, folder = POCKET, exported
    if kind == "legacy":
        base = make_liuhaotian(tmp_path / "base")
        folder = export_pretrained(base, tmp_path / "exported")
    original, reread, stock = (
        llava.load_processor(base),
        llava.load_processor(folder),
        AutoProcessor.from_pretrained(folder),
    )
    history = [("<image>\nWhat is it?", "A dog.")]
    prompt = original.chat_prompt("And this?", num_images=2, history=history)
    assert reread.chat_prompt("And this?", num_images=2, history=history) == prompt
    ids = original.encode(prompt)
    assert reread.encode(prompt) == ids
    messages = [user("What is it?", 1), assistant("A dog."), user("And this?", 2)]
    written = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert written == stock.tokenizer.bos_token + prompt
    images = [make_image(seed=seed) for seed in range(3)]
    assert stock(text=written, images=images, add_special_tokens=False)["input_ids"] == [ids]
    system = original.chat_prompt("Hello?", system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    assert stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=False).endswith(system)


def test_pictures_have_the_same_pixels(exported: Path) -> None:
    pixels = llava.load_processor(POCKET).pixel_values([PICTURES[0], make_image(width=90, height=20)])
    stock = AutoProcessor.from_pretrained(exported).image_processor
    from PIL import Image

    given = [Image.open(PICTURES[0]).convert("RGB"), make_image(width=90, height=20)]
    found = stock(given, return_tensors="pt")["pixel_values"]
    assert found.shape == pixels.shape
    assert (found - pixels).abs().mean() < 0.02  # transformers may resize with torchvision, this project does with PIL


def test_refusals_write_nothing(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in transformers' layout already"):
        export_pretrained(make_llava_hf(tmp_path / "hf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = sorted(path.name for path in exported.iterdir())
    with pytest.raises(UserError, match="not empty"):
        export_pretrained(POCKET, exported)
    assert sorted(path.name for path in exported.iterdir()) == before


def test_a_tokenizer_that_cannot_keep_the_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.export.lacks_space_after", lambda *_: False)
    with pytest.raises(UserError, match="gives other prompt ids"):
        export_pretrained(POCKET, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

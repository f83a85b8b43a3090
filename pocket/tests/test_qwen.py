"""The pocket Qwen2-VL: tokenizer, prompt, patches, start and export."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from llava import load_pretrained
from pocket.recipe import training
from pocket.recipe.draw import draw, sketch_of
from pocket.recipe.encode import IGNORE
from pocket.recipe.encode import Tokenizer as LlavaTokenizer
from pocket.recipe.qwen import export
from pocket.recipe.qwen.encode import Qwen
from pocket.recipe.qwen.model import fresh, take_over
from pocket.recipe.qwen.tokenizer import SPECIAL, load_tokenizer, train_tokenizer
from pocket.recipe.qwen.train_target import PLAN, start_model
from pocket.recipe.qwen.train_tower import BATCH, Heads, Pictures, losses_of
from pocket.recipe.sample import converse, draw_picture_data

TEACHER = Path(__file__).resolve().parents[1] / "llava"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    train_tokenizer(folder, number=400)
    return folder


@pytest.fixture(scope="module")
def family(tokens: Path) -> Qwen:
    return Qwen(tokens)


@pytest.fixture(scope="module")
def exported(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights in the published layout."""
    out = tmp_path_factory.mktemp("exported") / "qwen2vl"
    export.export(fresh(load_tokenizer(tokens), 3).state_dict(), tokens, out)
    return out


@pytest.fixture(scope="module")
def teacher() -> torch.nn.Module:
    return load_pretrained(TEACHER, dtype="float32")[0]


def test_numbers_are_one_token_and_text_comes_back(family: Qwen) -> None:
    text = "Ghana is at 43% in 2005, and 7 bars show 1000 k$.\nYes."
    assert family.tokenizer.decode(family.tokens(text)) == text
    assert len(family.tokens(" 43")) == len(family.tokens(" 2005")) == 1
    assert all(len(family.tokens(token)) == 1 for token in SPECIAL)


def test_loss_is_on_answers_and_their_end_only(family: Qwen) -> None:
    e = family.write([("What is it?", "It is red."), ("And now?", "Blue.")], Image.new("RGB", (160, 128)))
    asked = [label for label in e.labels if label != IGNORE]
    assert family.tokenizer.decode(asked) == "It is red.<|im_end|>Blue.<|im_end|>"
    assert all(label in (IGNORE, token) for token, label in zip(e.ids, e.labels, strict=True))
    assert e.ids.count(family.image) == 10 * 8


@pytest.mark.parametrize("size", [(160, 128), (128, 160), None])
def test_prompt_is_that_of_the_processor(family: Qwen, exported: Path, size: tuple[int, int] | None) -> None:
    processor = AutoProcessor.from_pretrained(exported)
    image = None if size is None else Image.new("RGB", size, (200, 30, 30))
    shown = [] if image is None else [{"type": "image"}]
    messages = [
        {"role": "user", "content": [*shown, {"type": "text", "text": "Describe it."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "There are 4 bars."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which is first?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=None if image is None else [image], return_tensors="pt")
    e = family.write([("Describe it.", "There are 4 bars."), ("Which is first?", None)], image)
    assert inputs["input_ids"][0].tolist() == e.ids
    if image is not None:
        assert e.patches is not None
        assert torch.equal(inputs["pixel_values"], e.patches)


def test_start_speaks_as_the_llava_does(family: Qwen, teacher: torch.nn.Module, tokens: Path) -> None:
    tokenizer = load_tokenizer(tokens)
    model = fresh(tokenizer, 0)
    talks = [converse(Random(i), text_share=1.0) for i in range(2)]
    batch = family.collate([family.encode(t) for t in talks])
    with torch.no_grad():
        before = training.loss_of(model, family, batch)
        take_over(model, tokenizer, teacher, LlavaTokenizer(TEACHER))
        after = training.loss_of(model, family, batch)
        embeds = torch.randn(1, 9, 256)
        own = model.model.language_model(inputs_embeds=embeds).last_hidden_state
        wanted = teacher.model.language_model(inputs_embeds=embeds).last_hidden_state
    assert after < before / 2
    assert torch.allclose(own, wanted, atol=0.02)


@pytest.mark.slow
def test_training_starts_from_tower_and_llava(family: Qwen, tokens: Path, tmp_path: Path) -> None:
    """The tower of the file, frozen; the LLaVA's words; and a step lowers the loss."""
    visual = fresh(load_tokenizer(tokens), 5).model.visual.state_dict()
    shutil.copytree(tokens, tmp_path / "run")
    torch.save({"visual": visual}, tmp_path / "run" / "tower.pt")
    model = start_model(tmp_path / "run", 0)
    assert all(torch.equal(w, visual[name]) for name, w in model.model.visual.state_dict().items())
    run = training.Run(tmp_path, model, family, PLAN, 10, 0)
    batch = family.collate([family.encode(converse(Random(i), text_share=0.3, turns=1)) for i in range(3)])
    losses = [run.update(batch) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(w, visual[name]) for name, w in model.model.visual.state_dict().items())


def test_merged_patches_meet_the_teachers(teacher: torch.nn.Module, tokens: Path) -> None:
    batch = Pictures(tokens, 0, 0, 1)[0]
    rng = Random("qwen-tower-0-0-0")
    sketch = sketch_of(draw_picture_data(rng, False))
    columns, rows = (side // 16 for side in sketch.image.size)
    assert batch["grid"][0].tolist() == [1, 2 * rows, 2 * columns]
    assert len(batch["places"]) == int((batch["grid"].prod(1) // 4).sum())
    first = batch["places"][: rows * columns].view(rows, columns)
    left, top = (10 - columns) // 2, (10 - rows) // 2
    assert first[0, 0] == top * 10 + left and first[-1, -1] == (top + rows - 1) * 10 + left + columns - 1
    assert int(batch["places"].max()) < BATCH * 100
    visual = fresh(load_tokenizer(tokens), 0).model.visual
    losses = losses_of(visual, teacher, Heads(), batch)
    assert all(loss.isfinite() for loss in losses.values())


def test_export_is_the_published_layout_and_loads(family: Qwen, tokens: Path, exported: Path) -> None:
    model = fresh(load_tokenizer(tokens), 3)
    loaded, report = Qwen2VLForConditionalGeneration.from_pretrained(
        exported, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    rounded = {name: w.to(torch.bfloat16) for name, w in model.state_dict().items()}
    assert all(torch.equal(w, rounded[name]) for name, w in loaded.state_dict().items())
    names = export.published_names(model.state_dict())
    assert {"visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"} <= set(names)
    assert AutoProcessor.from_pretrained(exported).image_processor.patch_size == 8
    image = draw(draw_picture_data(Random(1), True))
    assert family.pixels(image)[1].prod() == (image.width // 8) * (image.height // 8)


def test_without_a_tower_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no vision tower: .*qwen\.train_tower"):
        start_model(tmp_path, 0)


def test_a_finished_model_is_trained_further(tmp_path: Path, exported: Path) -> None:
    model = start_model(tmp_path, 0, exported)
    shipped = Qwen2VLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, shipped[name]) for name, weight in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.model.visual.parameters())
    assert all(weight.requires_grad for weight in model.model.language_model.parameters())

"""Prompt, loss mask, batches, schedule and export."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from llava import load_pretrained
from pocket.recipe import encode, export, patches, train_target, training
from pocket.recipe.draw import sketch_of
from pocket.recipe.encode import BOS, EOS, IGNORE, IMAGE_TOKEN_ID, IMAGE_TOKENS, Tokenizer
from pocket.recipe.model import fresh, parameter_count
from pocket.recipe.optimizer import Optimizers, orthogonal
from pocket.recipe.sample import converse, draw_picture_data
from pocket.recipe.spec import SCENE_COLOURS
from pocket.recipe.train_target import FROM_SCRATCH, FURTHER, Llava

MODEL = Path(__file__).resolve().parents[1] / "llava"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


def test_loss_is_on_answers_and_their_end_only(tokenizer: Tokenizer) -> None:
    turns = [("What is it?", "It is red."), ("And now?", "Blue.")]
    e = encode.encode(tokenizer, turns, np.zeros((3, 160, 160), np.float32))
    assert len(e.ids) == len(e.labels)
    asked = [i for i in e.labels if i != IGNORE]
    assert asked.count(EOS) == 2
    assert tokenizer.decode(asked) == "It is red. Blue."
    assert all(label in (IGNORE, token) for token, label in zip(e.ids, e.labels, strict=True))


def test_picture_takes_its_tokens(tokenizer: Tokenizer) -> None:
    e = encode.encode(tokenizer, [("What?", None)], np.zeros((3, 160, 160), np.float32))
    assert e.ids[0] == BOS and e.ids.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS
    assert set(e.labels) == {IGNORE}
    text = encode.encode(tokenizer, [("What?", None)], None)
    assert IMAGE_TOKEN_ID not in text.ids


def test_prompt_is_that_of_the_llava_package(tokenizer: Tokenizer) -> None:
    llava = pytest.importorskip("llava")
    processor = llava.load_processor(MODEL)
    history = [("Describe it.", "There are 4 bars."), ("Which is first?", None)]
    for has_image in (True, False):
        pixels = np.zeros((3, 160, 160), np.float32) if has_image else None
        mark = "<image>\n" if has_image else ""
        prompt = (f"{encode.SYSTEM} USER: {mark}Describe it. ASSISTANT: There are 4 bars.</s>"
                  "USER: Which is first? ASSISTANT:")  # fmt: skip
        image = Image.new("RGB", (160, 128))
        inputs = processor(text=prompt, images=image if has_image else None)
        assert inputs["input_ids"][0].tolist() == encode.encode(tokenizer, history, pixels).ids


def test_batches_repeat_and_keep_every_sample() -> None:
    first, second = (training.Batches(Llava(MODEL), FROM_SCRATCH, 0, 0, 1000).block(1) for _ in range(2))
    assert len(first) == training.BLOCK
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(first, second, strict=True))
    assert sum(len(b["ids"]) for b in first) == training.BLOCK * training.BATCH


def test_batches_go_on_where_a_run_stopped() -> None:
    every = list(training.Batches(Llava(MODEL), FROM_SCRATCH, 0, 0, 6))
    rest = list(training.Batches(Llava(MODEL), FROM_SCRATCH, 0, 3, 6))
    assert len(rest) >= 3
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(every[3:], rest, strict=True))


def test_rate_warms_up_stays_and_decays() -> None:
    rates = [FROM_SCRATCH.rate(s, 1000) for s in range(1000)]
    assert rates[0] < 0.1 and rates[300] == 1.0 and 0 < rates[-1] < 0.01
    assert FURTHER.rate(500, 1000) == pytest.approx(0.5 * 0.35)


def test_stages_follow_one_another() -> None:
    strides = [FROM_SCRATCH.stage(step, 1000).stride for step in (0, 374, 375, 939, 940, 999)]
    assert strides == [4, 4, 2, 2, 1, 1]


def test_model_fits_and_exports_every_tensor(tmp_path: Path) -> None:
    model = fresh(0)
    assert parameter_count(model) <= 15_900_000
    language, vision = export.split_tensors(model.state_dict())
    assert len(language) + len(vision) == len(model.state_dict())
    assert "model.mm_projector.2.bias" in language and "vision_model.pre_layrnorm.weight" in vision
    assert sum(t.numel() for t in [*language.values(), *vision.values()]) == parameter_count(model)


@pytest.mark.slow
def test_one_step_lowers_the_loss() -> None:
    model = fresh(0)
    talks = [converse(Random(i), turns=1) for i in range(2)]
    family = Llava(MODEL)
    batch = family.collate([family.encode(t) for t in talks])
    optimizer = Optimizers(model)
    losses = []
    for _ in range(3):
        loss = training.loss_of(model, family, batch)
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_muons_step_is_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for rows, columns in ((8, 8), (4, 12), (12, 4)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(2, rows, columns)))
        assert ((values > 0.5) & (values < 1.4)).all()


def test_a_layer_that_joins_silently_changes_nothing() -> None:
    layers = fresh(0).model.language_model.layers
    training.join_silently(layers[1], layers[0])
    x = torch.randn(1, 5, 256)
    rope = torch.ones(1, 5, 64), torch.zeros(1, 5, 64)
    output = layers[1](x, position_embeddings=rope)
    assert torch.equal(output[0] if isinstance(output, tuple) else output, x)


def test_every_patch_has_labels_of_what_it_shows(tokenizer: Tokenizer) -> None:
    picture = draw_picture_data(Random(3), False, "hbar")
    labelled = patches.label(tokenizer, sketch_of(picture))
    named = {token for token, _ in tokenizer.pieces(picture.names[0])}
    row = (16 + 16) // 16  # the first bar's row of patches, after the padding to a square
    there = {token for patch, token in labelled.tokens if patch // patches.GRID == row}
    assert named <= there
    said = {patch for patch, b in labelled.buckets if b == patches.bucket(f"value {picture.values[0][0]}")}
    assert any(patch // patches.GRID == row for patch in said)
    covered = labelled.cover[row * patches.GRID : (row + 1) * patches.GRID].sum(0)
    assert covered[list(SCENE_COLOURS).index(picture.colours[0])] > 0


@pytest.mark.slow
def test_a_finished_model_starts_where_it_stands(tmp_path: Path) -> None:
    family = Llava(MODEL)
    run = training.Run(tmp_path, train_target.start_model(tmp_path, 0, MODEL), family, FURTHER, 10, 0)
    shipped = load_pretrained(MODEL, dtype="float32")[0].state_dict()
    assert all(torch.equal(weight, shipped[name]) for name, weight in run.model.state_dict().items())
    talk = converse(Random(1), text_share=0.0, turns=1)
    assert run.update(family.collate([family.encode(talk)])) < 1.0
    assert len(run.model.model.language_model.layers) == len(run.layers)


def test_without_a_tower_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no vision tower: .*train_tower"):
        train_target.start_model(tmp_path, 0, None)

"""Prompt, loss mask, batches, schedule and export."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from pocket import encode, export, train_target
from pocket.encode import BOS, EOS, IGNORE, IMAGE_TOKEN_ID, IMAGE_TOKENS, Tokenizer
from pocket.model import fresh, parameter_count
from pocket.sample import converse

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


def test_batches_repeat_and_keep_every_sample(tokenizer: Tokenizer) -> None:
    first = train_target.training_batch_block(tokenizer, 0, 1)
    second = train_target.training_batch_block(tokenizer, 0, 1)
    assert len(first) == train_target.BLOCK
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(first, second, strict=True))
    assert sum(len(b["ids"]) for b in first) == train_target.BLOCK * train_target.BATCH


def test_rate_warms_up_stays_and_decays() -> None:
    rates = [train_target.rate(s, 1000) for s in range(1000)]
    assert rates[0] < 0.1 and rates[300] == 1.0 and 0 < rates[-1] < 0.01


def test_model_fits_and_exports_every_tensor(tmp_path: Path) -> None:
    model = fresh(0)
    assert parameter_count(model) <= 15_900_000
    language, vision = export.split_tensors(model.state_dict())
    assert len(language) + len(vision) == len(model.state_dict())
    assert "model.mm_projector.2.bias" in language and "vision_model.pre_layrnorm.weight" in vision
    assert sum(t.numel() for t in [*language.values(), *vision.values()]) == parameter_count(model)


def test_one_step_lowers_the_loss(tokenizer: Tokenizer) -> None:
    model = fresh(0)
    talks = [converse(Random(i), turns=1) for i in range(2)]
    batch = encode.collate([train_target.encode_conversation(tokenizer, t) for t in talks])
    optimizer = train_target.optimizer_of(model)
    losses = []
    for _ in range(3):
        loss = train_target.loss_of(model, batch, torch.device("cpu"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

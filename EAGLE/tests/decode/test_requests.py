"""Calls of `MSDModel.generate` with wrong inputs: one clear line each. Lengths that caches cannot be sized by."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_llava_hf
from tiny_stock import make_qwen
from transformers import GenerationConfig

from eagle import MSDModel, TreeConfig
from eagle.decode import decoder
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from llava.errors import UserError

PROMPTS = ["USER: Name two rivers of the world. ASSISTANT:", "USER: Hi ASSISTANT:"]
MAKERS: dict[str, Callable[[Path], Path]] = {"llava": make_llava_hf, "qwen2_vl": make_qwen}


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("requests")
    target = load_target(MAKERS[request.param](folder / "base"), dtype=torch.float32)
    draft = make_draft(folder / "draft", target, agree=1.0)
    return MSDModel(target, load_draft(draft, dtype=torch.float32), TreeConfig(4, 4, 16))


def line_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 (give a whole number)"),
        ({"max_new_tokens": True}, "max_new_tokens=True (give a whole number)"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 (give at least 1)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 (give at least 1)"),
        ({"max_new_tokens": "5"}, "max_new_tokens='5' (give a whole number)"),
        ({"tree": "auto"}, "tree='auto' (give a TreeConfig"), ({"tree": 5}, "tree=5 (give a TreeConfig"),
        ({"stop_strings": 5}, "stop_strings=5 (give a text"), ({"stop_strings": ["a", 5]}, "stop_strings"),
        ({"temperature": "x"}, "temperature='x' (give a number)"), ({"do_sample": "no"}, "do_sample='no'"),
        ({"eos_token_id": "x"}, "eos_token_id='x'"), ({"bad_words_ids": [[10**6]]}, "1000000 is not an id"),
        ({"generation_config": GenerationConfig(max_time="x")}, "max_time='x' (give a number)"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings(model: MSDModel, settings: dict[str, Any], said: str) -> None:
    inputs = model.target.prepare(PROMPTS[1])
    assert said in line_of(lambda: model.generate(**inputs, **{"max_new_tokens": 4, "do_sample": False, **settings}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids: {"input_ids": ids[:0]}, "at least one prompt"),
        (lambda ids: {"input_ids": ids[:, :0]}, "at least one token"),
        (lambda ids: {"input_ids": ids[0]}, "input_ids is int64 of shape"),
        (lambda ids: {"input_ids": ids[None]}, "input_ids is int64 of shape"),
        (lambda ids: {"input_ids": ids.float()}, "input_ids is float32 of shape"),
        (lambda ids: {"input_ids": ids.tolist()}, "input_ids is a list"),
        (lambda ids: {"input_ids": ids.clone().fill_(10**6)}, "input_ids has 1000000, the model has tokens 0 to"),
        (lambda ids: {"input_ids": ids.clone().fill_(-1)}, "input_ids has -1"),
        (lambda ids: {"attention_mask": torch.ones(1, ids.shape[1] + 1)}, "attention_mask is float32 of shape (1, "),
        (lambda ids: {"attention_mask": torch.ones(2, ids.shape[1])}, "attention_mask is float32 of shape (2, "),
        (lambda ids: {"attention_mask": torch.ones(ids.shape[1])}, "attention_mask is float32 of shape ("),
        (lambda ids: {"attention_mask": [[1] * ids.shape[1]]}, "attention_mask is a list"),
    ],
)
def test_wrong_tensors(model: MSDModel, change: Callable[[torch.Tensor], dict[str, Any]], said: str) -> None:
    ids = model.target.prepare(PROMPTS[0])["input_ids"]
    given = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False, **change(ids)}
    assert said in line_of(lambda: model.generate(**given))


def test_pictures_and_their_places_go_together(model: MSDModel) -> None:
    settings = {"max_new_tokens": 4, "do_sample": False}
    with_picture = model.target.prepare(model.target.chat_prompt("What?", 1), [make_image()])
    text = model.target.prepare(PROMPTS[1])
    media = {name for name in with_picture if name.startswith(("pixel", "image"))}
    places = {name: value for name, value in with_picture.items() if name not in media}
    assert "the images give 0" in line_of(lambda: model.generate(**places, **settings))
    pictures = {name: with_picture[name] for name in media}
    assert "places for 0 image tokens" in line_of(lambda: model.generate(**text, **pictures, **settings))


def test_stop_strings_of_a_call_with_custom_generate(model: MSDModel) -> None:
    inputs, generate = model.target.prepare(PROMPTS[0]), model.target.model.generate
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    whole = model.generate(**inputs, **settings).tokens[0]
    texts = (model.tokenizer.decode([token]).strip() for token in whole[2:])
    stop = next(text for text in texts if text.isascii() and text.isprintable() and text)
    wanted = generate(**inputs, **settings, stop_strings=stop, tokenizer=model.tokenizer)
    assert wanted.shape[1] < inputs["input_ids"].shape[1] + len(whole)
    given = {**settings, "stop_strings": stop, "tokenizer": model.tokenizer}
    assert torch.equal(generate(**inputs, **given, custom_generate=model), wanted)
    given["stop_strings"] = 5
    assert "stop_strings=5" in line_of(lambda: generate(**inputs, **given, custom_generate=model))


def test_a_length_that_no_cache_could_have(model: MSDModel) -> None:
    """Memory follows the answer, which ends long before."""
    inputs = model.target.prepare(PROMPTS[0])
    end = model.generate(**inputs, max_new_tokens=9, do_sample=False).tokens[0][-1]
    wanted = model.target.model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use_msd in (True, False):
        output = model.generate(**inputs, max_new_tokens=10**9, do_sample=False, eos_token_id=end, use_msd=use_msd)
        assert torch.equal(output.sequences, wanted)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_caches_grow_with_the_answer(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = model.target.prepare(PROMPTS)
    wanted = model.generate(**batch, max_new_tokens=60, do_sample=False).tokens
    monkeypatch.setattr(decoder, "AHEAD", 3)
    for trees in (TreeConfig(4, 4, 16), TreeConfig(1, 2, 4)):
        assert model.generate(**batch, max_new_tokens=60, do_sample=False, tree=trees).tokens == wanted
        for prompt, tokens in zip(PROMPTS, wanted, strict=True):
            alone = model.target.prepare(prompt)
            assert model.generate(**alone, max_new_tokens=60, do_sample=False, tree=trees).tokens == [tokens]


@pytest.mark.parametrize("above", [1, 6])
def test_min_length_counts_the_own_prompt_and_max_length_the_padding(model: MSDModel, above: int) -> None:
    batch = model.target.prepare(PROMPTS)
    padded = batch["input_ids"].shape[1]
    free = model.generate(**batch, max_new_tokens=20, do_sample=False).tokens
    settings = {"do_sample": False, "eos_token_id": free[1][2], "min_length": padded + above}
    together = model.generate(**batch, max_new_tokens=20, **settings).tokens
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        alone = model.target.prepare(prompt)
        expected = model.target.model.generate(**alone, max_new_tokens=20, **settings)
        assert tokens == expected[0, alone["input_ids"].shape[1] :].tolist()
    limit: dict[str, Any] = {"max_length": padded + above, "do_sample": False}
    assert torch.equal(model.generate(**batch, **limit).sequences, model.target.model.generate(**batch, **limit))

"""Parity with the reference values of tests/fixtures/parity, and of a larger set if it is there (see `parity_dir`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_fixture import CASES
from safetensors.torch import load_file

from llava import load_model, load_pretrained

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def loaded(request: pytest.FixtureRequest, parity_dir: Path) -> Iterator[Loaded]:
    folder = parity_dir / "llava" / "tiny-llava-v1.5"
    yield load_pretrained(folder, dtype="float32", attn_implementation=request.param)


def facts_of(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "llava" / "cases" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"case {name} is in the larger set only")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_reference_values(loaded: Loaded, parity_dir: Path, name: str) -> None:
    model, processor = loaded
    record = facts_of(parity_dir, name)
    reference = load_file(parity_dir / "llava" / "cases" / f"{name}.safetensors")
    kept = reference.get("rows", slice(None))
    image = parity_dir / record["image"] if record["image"] else None
    inputs = processor(text=record["prompt"], images=image)

    ids = reference.get("input_ids_expanded", reference["input_ids"])
    assert torch.equal(inputs["input_ids"], ids.where(ids >= 0, processor.image_token_id))
    if "pixel_values" in reference:
        assert torch.equal(inputs["pixel_values"], reference["pixel_values"])
    embeds = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.inference_mode():
        hidden = model.model(**inputs).last_hidden_state
        values, top = model.lm_head(hidden[:, -1]).topk(20)
    handle.remove()
    torch.testing.assert_close(embeds[0][:, kept], reference["inputs_embeds"], atol=1e-4, rtol=0)
    torch.testing.assert_close(hidden[:, kept], reference["base_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(values, reference["base_logits_topk_values"], atol=1e-4, rtol=0)
    assert torch.equal(top, reference["base_logits_topk_ids"])


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids(loaded: Loaded, parity_dir: Path, name: str) -> None:
    model, processor = loaded
    record = facts_of(parity_dir, name)
    inputs = processor(text=record["prompt"], images=parity_dir / record["image"] if record["image"] else None)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=record["max_new_tokens"])
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == record["hf_generate_ids"]


def test_auto_dtype_is_the_stored_one(parity_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.device.cpu_has_bfloat16", lambda: True)
    model = load_model(parity_dir / "llava" / "tiny-llava-v1.5")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}

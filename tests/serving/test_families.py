"""Drafts of the other families in vLLM are ours too: tiny models with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_support import MAKERS, TOKENS, Pair, Run, calm, load_msd, make_questions
from tiny_draft import make_draft

from eagle.families import FAMILIES, load_target
from eagle.serving.draft import export_draft

pytestmark = pytest.mark.by_hand

IN_POCKET = {"llava", "qwen2_vl"}


def test_every_family_that_is_exported_is_compared() -> None:
    assert {family.name for family in FAMILIES if family.vllm} == MAKERS.keys() | IN_POCKET


def guessing(draft: Path, scale: float = 0.5) -> Path:
    """A draft that passes the token's embedding on more than the hidden state, and adds little in its layer."""
    tensors = load_file(draft / "model.safetensors")
    size = len(tensors["fc.weight"])
    for name, tensor in tensors.items():
        if name.startswith("layers") and tensor.ndim == 2:
            tensor.mul_(scale)
    tensors["fc.weight"].mul_(0.02)
    tensors["fc.weight"][:, :size] += torch.eye(size)
    tensors["fc.bias"].zero_()
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    return draft


@pytest.mark.parametrize("family", MAKERS)
def test_the_chain_is_ours(family: str, tmp_path: Path, run_engine: Run) -> None:
    base = MAKERS[family](tmp_path / "base")
    if family == "qwen3_vl":  # this one repeats itself
        source = make_draft(tmp_path / "draft", load_target(base, dtype=torch.float32), agree=1.0)
    else:
        calm(base)
        source = guessing(make_draft(tmp_path / "draft", load_target(base, dtype=torch.float32)))
    pair = Pair(base, source, base, export_draft(source, tmp_path / "exported", base), load_msd(base, source))
    questions = make_questions(tmp_path)
    ours = pair.answers(questions)
    found = run_engine(pair, [pair.request(each) for each in questions], max_model_len=512)
    assert found["ids"] == ours.ids
    assert found["counters"]["num_accepted_tokens_per_pos"] == ours.accepted
    assert found["counters"]["num_drafts"] == ours.drafts
    assert 0 < ours.accepted[0] < ours.drafts  # a draft that agrees now and then
    assert any(len(ids) == TOKENS for ids in ours.ids)

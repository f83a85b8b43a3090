"""Drafts of the other families in vLLM are ours too: tiny models with random weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_support import TOKENS, Pair, Run, load_msd
from tiny_draft import make_draft
from tiny_families import make_qwen3_vl
from tiny_llava import make_image
from tiny_stock import make_llava_next, make_qwen

from eagle.families import FAMILIES, load_target
from eagle.questions import Question
from eagle.serving.draft import export_draft

pytestmark = pytest.mark.by_hand

HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}  # of 32: the smallest that vLLM has on a CPU
ROPE = {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 1e6}
MAKERS: dict[str, Callable[..., Path]] = {
    "llava_next": partial(make_llava_next, **HEAD),
    "qwen2_5_vl": partial(make_qwen, version="2.5", **HEAD, rope_parameters=ROPE),
    "qwen3_vl": partial(make_qwen3_vl, **HEAD, head_dim=32, rope_parameters={**ROPE, "mrope_interleaved": True}),
}
IN_POCKET = {"llava", "qwen2_vl"}


def test_every_family_that_is_exported_is_compared() -> None:
    assert {family.name for family in FAMILIES if family.vllm} == MAKERS.keys() | IN_POCKET


def calm(base: Path, scale: float = 0.5) -> None:
    """Smaller weights in the layers of the text model, so that an untrained draft can guess a token now and then; and
    the published names of CLIP's tensors, where transformers leaves a part out that vLLM wants."""
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        name = name.replace("vision_tower.embeddings", "vision_tower.vision_model.embeddings")
        name = re.sub(r"vision_tower\.(encoder|pre_layrnorm|post_layernorm)", r"vision_tower.vision_model.\1", name)
        in_text = "layers" in name and "vision" not in name and "visual" not in name and tensor.ndim == 2
        tensors[name] = scale * tensor if in_text else tensor
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


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
    pictures = []
    for number, (width, height) in enumerate([(50, 34), (30, 90), (64, 64)]):
        path = tmp_path / f"{number}.png"
        make_image(path, width, height, seed=number)
        pictures.append(path)
    questions = [
        Question("one", "And this?", (pictures[0],)),
        Question("two", "Which of these can you count?", (pictures[1], pictures[2])),
        Question("none", "Hello there"),
        Question("again", "What is in this picture?", (pictures[1],)),
    ]
    ours = pair.answers(questions)
    found = run_engine(pair, [pair.request(each) for each in questions], max_model_len=512)
    assert found["ids"] == ours.ids
    assert found["counters"]["num_accepted_tokens_per_pos"] == ours.accepted
    assert found["counters"]["num_drafts"] == ours.drafts
    assert 0 < ours.accepted[0] < ours.drafts  # a draft that agrees now and then
    assert any(len(ids) == TOKENS for ids in ours.ids)

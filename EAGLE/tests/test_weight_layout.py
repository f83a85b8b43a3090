"""Weights are laid for products with few rows, and nothing but their strides changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_llava_hf
from torch import nn

from eagle import MSDModel
from eagle.families import load_target
from eagle.weight_layout import input_major, to_input_major_layout


class Quantised(nn.Linear):
    """Stands for a layer whose weights are not what its class says."""


def test_the_weights_of_one_input_lie_side_by_side() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    laid = input_major(weight)
    assert torch.equal(laid, weight)
    assert laid.stride() == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_kinds_of_numbers_stay(dtype: torch.dtype) -> None:
    weight = torch.ones(2, 3, dtype=dtype)
    assert input_major(weight) is weight


def test_weights_that_are_elsewhere_stay() -> None:
    weight = torch.ones(2, 3, device="meta")
    assert input_major(weight) is weight


def test_an_embedding_that_is_the_head_and_layers_of_other_classes_stay() -> None:
    embedding, head, other, plain = nn.Embedding(5, 4), nn.Linear(4, 5), Quantised(4, 5), nn.Linear(4, 5)
    head.weight = embedding.weight
    to_input_major_layout(nn.ModuleList([embedding, head, other, plain]), skip=[embedding.weight])
    assert all(layer.weight.is_contiguous() for layer in (embedding, head, other))
    assert plain.weight.stride() == (1, 5)


def test_a_pair_is_arranged_and_answers_and_saves_as_before(tmp_path: Path) -> None:
    base = make_llava_hf(tmp_path / "base")
    target = load_target(base, dtype=torch.float32)
    draft = make_draft(tmp_path / "draft", target)
    inputs = target.prepare(target.chat_prompt("How many?", num_images=1), [make_image()])
    wanted = target.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}

    msd = MSDModel.from_pretrained(base, draft, dtype=torch.float32)
    laid = [msd.target.text_model.layers[0].mlp.up_proj, msd.target.model.lm_head]
    assert msd.draft is not None
    laid += [msd.draft.fc, msd.draft.layers[0].mlp.down_proj, *msd.draft.layers[0].self_attn.fused]
    assert all(layer.weight.stride(0) == 1 for layer in laid)
    joined, part = msd.draft.layers[0].self_attn.fused[0], msd.draft.layers[0].self_attn.q_proj
    assert part.weight.untyped_storage().data_ptr() == joined.weight.untyped_storage().data_ptr()
    assert all(torch.equal(before[name], tensor) for name, tensor in msd.target.model.state_dict().items())
    assert torch.equal(msd.generate(**inputs, max_new_tokens=24, temperature=0.0).sequences, wanted)

    msd.target.model.save_pretrained(tmp_path / "again")
    again = type(msd.target.model).from_pretrained(tmp_path / "again", dtype=torch.float32).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in again.items())

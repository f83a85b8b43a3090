"""Memory layout of the weights of linear layers.

Verifying a tree multiplies about a dozen rows with each weight. For so few rows, float32 products on a CPU are faster
if the weights of one input are adjacent (input-major) than in `nn.Linear`'s layout, where the weights of one output
are. Shapes and values do not change. On an accelerator both layouts are equally fast, so nothing is changed there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def input_major(weight: Tensor) -> Tensor:
    """``weight`` [out, in] with strides (1, out) if that is faster, else unchanged."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight


def to_input_major_layout(model: nn.Module, skip: Iterable[Tensor] = ()) -> None:
    """Changes the layout of all plain linear layers of ``model``. Needs additional memory for one of them.

    Args:
        skip: weights that are not changed, such as a head that is also the token embedding, whose rows are looked up.
    """
    kept = {id(weight) for weight in skip}
    for layer in model.modules():
        if type(layer) is nn.Linear and id(layer.weight) not in kept:
            layer.weight.data = input_major(layer.weight.data)

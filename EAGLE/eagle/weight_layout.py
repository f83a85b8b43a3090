"""The order in which a linear layer's weights lie in memory.

A tree of a dozen nodes multiplies a dozen rows with each weight. For so few rows the CPU's float32 products are faster
where the weights of one input lie side by side (input-major) than in `nn.Linear`'s own order, where those of one output
do; for a single row both are alike. Shapes and values stay, so nothing that reads the weights notices.

An accelerator's products take either order at the same speed, so there nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def input_major(weight: Tensor) -> Tensor:
    """``weight`` [out, in], the same values: input-major, with strides (1, out), where products gain by it, else as it
    is."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight


def to_input_major_layout(model: nn.Module, skip: Iterable[Tensor] = ()) -> None:
    """Arranges the weights of all plain linear layers of ``model``, one after the other, so that memory for one of them
    is enough.

    Args:
        skip: weights that stay as they are, such as a token embedding that is also the head: its rows are looked up.
    """
    kept = {id(weight) for weight in skip}
    for layer in model.modules():
        if type(layer) is nn.Linear and id(layer.weight) not in kept:
            layer.weight.data = input_major(layer.weight.data)

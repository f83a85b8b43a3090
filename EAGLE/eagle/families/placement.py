"""On which device a base model goes, if the caller leaves it open.

A model that is spread over several accelerators waits at every border, and cannot be compiled. So it is loaded to one
if its weights, a draft, a cache and some room fit there, and is spread only if they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from llava.files import read_object
from llava.hub import Source
from llava.weights import find_weights, read_shapes

ROOM = 1.2
"""Memory for weights, draft and cache, relative to the weights."""
SPARE = 1 << 30
"""Further memory of the working set, in bytes."""


class Placement(NamedTuple):
    """``device_map`` as in transformers. ``line``: says what was chosen and why; empty if nothing was to choose."""

    device_map: Any
    line: str = ""


def place(source: Source, dtype: Any, device_map: Any, quantized: bool) -> Placement:
    """The placement of a base model.

    Args:
        dtype: a torch dtype, its name, or "auto" for the checkpoint's own.
        device_map: what the caller gave. Only None and "auto" leave it open.
        quantized: a quantization_config was given, so the checkpoint's sizes say little.
    """
    if device_map not in (None, "auto") or quantized or not torch.accelerator.is_available():
        return Placement(device_map)
    free = free_memory()
    weights = weight_bytes(source, dtype)
    need = int(ROOM * weights) + SPARE
    best = max(free, key=lambda each: each[1] or 0)
    if best[1] is None:
        return Placement({"": best[0]}, f"base model on {best[0]} ({gigabytes(weights)} of weights)")
    room = f"{gigabytes(weights)} of weights, {gigabytes(best[1])} free on {best[0]}"
    if best[1] >= need:
        return Placement({"": best[0]}, f"base model on {best[0]} ({room})")
    return Placement("auto", f"base model spread over all devices by accelerate ({room}, {gigabytes(need)} wanted)")


def weight_bytes(source: Source, dtype: Any) -> int:
    """Size of a checkpoint's weights in ``dtype``. Reads only headers and the config."""
    if dtype == "auto":
        config = read_object(source.require("config.json", "base model config"), "base model config")
        text = config.get("text_config") or {}
        named = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
        dtype = named if isinstance(named, str) else "float16"
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, torch.float16)
    return kind.itemsize * sum(prod(shape) for shape in read_shapes(find_weights(source)).values())


def free_memory() -> Sequence[tuple[str, int | None]]:
    """Each accelerator's name and free memory in bytes; None if it does not tell."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    tell = getattr(torch.get_device_module(kind), "mem_get_info", None)
    return [
        (f"{kind.type}:{index}", None if tell is None else int(tell(index)[0]))
        for index in range(torch.accelerator.device_count())
    ]


def gigabytes(size: int) -> str:
    """
    >>> gigabytes(14_100_000_000)
    '14.1 GB'
    """
    return f"{size / 1e9:.1f} GB"

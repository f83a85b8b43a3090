"""The dtype that suits the device of a model."""

from __future__ import annotations

from typing import Any

import torch


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products. Without them torch is slower than in
    float32, 25 times on the machine where it was measured."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True  # an older torch cannot tell
    able = torch.cpu.get_capabilities()
    if able.get("architecture", "x86_64") != "x86_64":
        return True
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert"))


def on_cpu(device_map: Any) -> bool:
    """Whether a transformers `device_map` puts everything on the CPU."""
    if isinstance(device_map, dict):
        return all(on_cpu(place) for place in device_map.values())
    if device_map in (None, "cpu"):
        return True
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.accelerator.is_available()
    return isinstance(device_map, torch.device | str) and torch.device(device_map).type == "cpu"


def dtype_for(dtype: Any, device_map: Any) -> Any:
    """``dtype``, or float32 for "auto" on a CPU that is slow in 16 bit: exact, but twice the memory."""
    if dtype == "auto" and on_cpu(device_map) and not cpu_has_bfloat16():
        return torch.float32
    return dtype

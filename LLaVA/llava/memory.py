"""What running out of memory looks like on each kind of device."""

from __future__ import annotations

import re

import torch

TOLD = ("DefaultCPUAllocator", "CUDA error: out of memory", "ALLOC_FAILED")
"""Parts of messages of failures that torch has no class of its own for: the CPU's, CUDA's outside of torch's allocator,
and those of cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a tensor found no room, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(told in str(error) for told in TOLD)
    )


def told_by(error: BaseException) -> str | None:
    """What the device says of its memory, without advice on environment variables: the first sentences, if any."""
    sentences = re.split(r"(?<=\.)\s", str(error).strip())
    return " ".join(sentences[:3]) or None

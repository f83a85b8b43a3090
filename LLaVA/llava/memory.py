"""Recognises out-of-memory errors of every kind of device."""

from __future__ import annotations

import re

import torch

MESSAGES = ("DefaultCPUAllocator", "CUDA error: out of memory", "ALLOC_FAILED")
"""Parts of the messages of errors that have no class in torch: of the CPU, of CUDA outside torch's allocator, of cuBLAS
and of cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the CPU had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in MESSAGES)
    )


def memory_message(error: BaseException) -> str | None:
    """The first sentences of the error, which say how much memory there is, without advice on environment variables."""
    sentences = re.split(r"(?<=\.)\s", str(error).strip())
    return " ".join(sentences[:3]) or None

"""Out-of-memory errors of every kind of device: how to recognise them, and how to retry with less."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .errors import OutOfMemory

T = TypeVar("T")
R = TypeVar("R")

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


def within_memory(work: Callable[[], R]) -> R | None:
    """The result of ``work``, or None if memory ran out. Other errors are raised.

    None is returned after the error handler has ended, because the handler keeps the tensors of the failed work alive.
    """
    try:
        return work()
    except (RuntimeError, MemoryError, OutOfMemory) as error:
        if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
            raise
    torch.cuda.empty_cache()
    return None


def halved_within_memory(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R | None]:
    """``work(items)``, which gives one result for each item. If memory runs out, each half of the items on its own, and
    so on. An item alone is tried twice, because the first failure empties the device's cache. None for an item that
    does not fit even then."""
    if not items:
        return []
    results = within_memory(lambda: work(items))
    if results is None and len(items) == 1:
        results = within_memory(lambda: work(items))
    if results is not None:
        return list(results)
    if len(items) == 1:
        return [None]
    half = len(items) // 2
    return halved_within_memory(work, items[:half]) + halved_within_memory(work, items[half:])

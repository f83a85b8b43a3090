"""How to retry with less after an out-of-memory error of any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .errors import OutOfMemory, is_out_of_memory

T = TypeVar("T")
R = TypeVar("R")


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

"""The next items of an iterator, made in a thread while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
END: Any = object()


def prefetch(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """``items`` in their order, with the next ``depth`` on their way. What making one raises is raised in its place.

    The thread uses the accelerator that is current where this is called: memory that it pins belongs to that one.
    """
    pool = ThreadPoolExecutor(1, "prefetch", initializer=_same_device())
    try:
        coming = deque(pool.submit(next, items, END) for _ in range(depth))
        while (item := coming.popleft().result()) is not END:
            coming.append(pool.submit(next, items, END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _same_device() -> Callable[[], None]:
    """What makes a new thread use the accelerator of this one; nothing where none is in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return lambda: None
    number = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(number)

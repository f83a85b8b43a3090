"""Which requests are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batches(items: Iterable[Item], key: Callable[[Item], Hashable], size: int) -> Iterator[list[Item]]:
    """Items of equal key, at most ``size`` together; within a key in their order.

    >>> list(batches([1, 3, 2, 5, 7], lambda number: number % 2, 2))
    [[1, 3], [5, 7], [2]]
    """
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]

"""Places inside parsed JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def key_paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys of an object, and of the objects in it."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from key_paths(inner, (*path, key))


def replaced(content: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """The object with another value at a path of keys."""
    first, *rest = path
    return {**content, first: replaced(content.get(first, {}), rest, value) if rest else value}

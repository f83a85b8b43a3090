"""Checks of what a file says of itself, field by field: files can be damaged, or made by another program."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def wrong_fields(value: Any, wanted: Mapping[str, Check]) -> str:
    """What is wrong with a JSON object, in words; "" where it has exactly the wanted fields, each of its kind.

    >>> wrong_fields({"a": 1, "b": "x", "d": 0}, {"a": text, "b": text, "c": count})
    "a 1, no c, unknown 'd'"
    """
    if not isinstance(value, Mapping):
        return f"no object but {shown(value)}"
    wrong = []
    for name, check in wanted.items():
        if name not in value:
            wrong.append(f"no {name}")
        elif not check(value[name]):
            wrong.append(f"{name} {shown(value[name])}")
    wrong += [f"unknown {shown(name)}" for name in value if name not in wanted]
    return ", ".join(wrong)


def shown(value: Any) -> str:
    """A short form of any JSON value, for a message."""
    text = "[...]" if isinstance(value, list) else "{...}" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def text(value: Any) -> bool:
    return isinstance(value, str)


def count(value: Any) -> bool:
    """A whole number of at least 0; True is none."""
    return type(value) is int and value >= 0


def number(value: Any) -> bool:
    """A finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < float("inf")


def one_of(*values: Any) -> Check:
    return lambda value: any(type(value) is type(known) and value == known for known in values)


def matching(pattern: str) -> Check:
    """Text that is as a whole of this form."""
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def optional(check: Check) -> Check:
    """None, or what ``check`` takes."""
    return lambda value: value is None or check(value)


def record(wanted: Mapping[str, Check]) -> Check:
    """An object with exactly these fields."""
    return lambda value: not wrong_fields(value, wanted)


def list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def counts_by_name(value: Any) -> bool:
    """An object of whole numbers."""
    return isinstance(value, Mapping) and all(map(count, value.values()))

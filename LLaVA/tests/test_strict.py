"""Strict settings: every bad value is one line that names the key, what was found and what is wanted."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any, Literal

import pytest
from pydantic import Field

from llava.errors import UserError
from llava.strict import read_strict, strict_dataclass


@strict_dataclass
class Part:
    size: int = Field(3, ge=1, le=9)
    share: float = 0.5


@strict_dataclass
class Whole:
    name: str
    parts: dict[str, Part] = Field(default_factory=dict)
    steps: tuple[Part, ...] = ()
    more: Part | None = None
    kind: Literal["a", "b"] = "a"
    code: str = Field("xx", pattern="[a-z]{2,3}")


@pytest.mark.parametrize(("given", "line"), [
    ({"name": "x", "kinds": "a"}, "unknown key 'kinds': FILE (did you mean 'kind'?)"),
    ({"name": "x", "parts": {"p": {"sise": 1}}}, "unknown key 'parts.p.sise': FILE (did you mean 'size'?)"),
    ({"name": "x", "steps": [{}, {"shares": 1}]}, "unknown key 'steps.1.shares': FILE (did you mean 'share'?)"),
    ({"name": "x", "more": {"zzz": 1}}, "unknown key 'more.zzz': FILE (known keys: share, size)"),
    ({"name": "x", "parts": {"p": {"size": "4"}}}, "parts.p.size='4': FILE (give a whole number)"),
    ({"name": "x", "more": {"size": 0}}, "more.size=0: FILE (give at least 1)"),
    ({"name": "x", "more": {"size": 10}}, "more.size=10: FILE (give at most 9)"),
    ({"name": "x", "more": {"share": True}}, "more.share=True: FILE (give a number)"),
    ({"name": "x", "more": 3}, "more=3: FILE (give an object)"),
    ({"name": 1}, "name=1: FILE (give a text)"),
    ({"name": "x", "kind": "c"}, "kind='c': FILE (give 'a' or 'b')"),
    ({"name": "x", "code": "1"}, "code='1': FILE (String should match pattern '[a-z]{2,3}')"),
    ({}, "lacks 'name': FILE (give it a value)"),
    ([], "not a JSON object but list: FILE"),
])  # fmt: skip
def test_errors_of_a_file(given: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        read_strict(Whole, given, "FILE")
    assert str(error.value) == line


def test_nested_objects_and_lists_become_dataclasses_and_tuples() -> None:
    read = read_strict(Whole, {"name": "x", "parts": {"p": {"size": 4}}, "steps": [{"share": 1}]}, "FILE")
    assert read == Whole("x", {"p": Part(4)}, (Part(share=1.0),))


@pytest.mark.parametrize(("make", "line"), [
    (lambda: Part(0), "size=0 (give at least 1)"),
    (lambda: Part(3, "x"), "share='x' (give a number)"),  # type: ignore[arg-type]
    (lambda: Part(siz=3), "unknown key 'siz' (did you mean 'size'?)"),  # type: ignore[call-arg]
    (lambda: replace(Part(), size=2.5), "size=2.5 (give a whole number)"),
])  # fmt: skip
def test_errors_of_a_call(make: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == line


def test_it_is_a_frozen_dataclass() -> None:
    part = Part(size=5)
    assert asdict(part) == vars(part) == {"size": 5, "share": 0.5}
    assert [field.name for field in fields(Part)] == ["size", "share"]
    with pytest.raises(AttributeError):
        part.size = 6  # type: ignore[misc]


@strict_dataclass
class Unions:
    """Fields of several types."""

    size: int | tuple[int, int] | None = None
    kind: bool | Literal["a", "b"] = False


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "c"}, "kind='c': here (give true or false, or 'a' or 'b')"),
        ({"size": "c"}, "size='c': here (give a whole number, or a list)"),
        ({"size": [1, "c"]}, "size.1='c': here (give a whole number)"),
        ({"size": [1]}, "lacks 'size.1': here (give it a value)"),
    ],
    ids=str,
)
def test_a_field_of_several_types_names_them(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        read_strict(Unions, given, "here")
    assert str(raised.value) == said

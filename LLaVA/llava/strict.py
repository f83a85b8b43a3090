"""Typed, strict settings: a frozen pydantic dataclass whose errors are one `UserError` line.

A wrong type, a value out of bounds or an unknown key is an error. An unknown key's error names the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from .errors import UserError

T = TypeVar("T")
SIMILAR = 0.9
"""From this similarity on a key is a misspelt one. Keys of different meaning in transformers' configs are below it."""
_CONFIG = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
_WANTED = {
    "int_type": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "bool_type": "give true or false",
    "string_type": "give a text",
    "dict_type": "give an object",
    "dataclass_type": "give an object",
    "tuple_type": "give a list",
    "greater_than_equal": "give at least {ge}",
    "less_than_equal": "give at most {le}",
    "finite_number": "give a finite number",
    "greater_than": "give more than {gt}",
    "too_short": "give at least {min_length}",
    "string_unicode": "it has half of a character (a lone surrogate)",
    "string_too_short": "give a text of at least one character",
}
"""What to say in place of pydantic's words, by the type of the error."""
_UNION_BRANCH = re.compile(r"(int|float|bool|str|(literal|list|tuple|dict|constrained|function)\b.*)", re.DOTALL)
"""What pydantic adds to the place of a problem in a union: the type that was tried."""


@dataclass_transform(frozen_default=True)
def strict_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass that checks its values when it is made. `dataclasses.fields`, `replace` and `asdict` work.

    Bounds of a field: ``name: int = pydantic.Field(default, ge=1)`` or ``Annotated[int, Field(ge=1)] = default``.

    Raises:
        UserError: when an object is made with a wrong, unknown or missing value.
    """
    made: Any = pydantic_dataclass(frozen=True, config=_CONFIG)(cls)
    make = made.__init__

    @functools.wraps(make)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, *args, **kwargs)
        except ValidationError as error:
            raise one_line(error, made) from None

    made.__init__ = checked
    return made


def read_strict(kind: type[T], given: Any, where: str | Path | None) -> T:
    """An object of a `strict_dataclass` from a parsed JSON object. Objects and lists inside it become the dataclasses
    and tuples that the fields' types name.

    Args:
        where: the file or section, named in errors; None where there is only one.

    Raises:
        UserError: ``given`` is not an object, or has a wrong, unknown or missing value.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"not a JSON object but {type(given).__name__}", where=where)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(given))
    except ValidationError as error:
        found = one_line(error, kind)
    except UserError as error:  # of a __post_init__
        found = error
    raise UserError(found.what, where=where, fix=found.fix) from None


def reject_unknown(given: Iterable[str], known: Iterable[str], where: str | Path | None) -> None:
    """Raises `UserError` for the first key of ``given`` that is not in ``known``. It names the nearest known key."""
    known = list(known)
    for key in given:
        if key not in known:
            raise UserError(f"unknown key '{key}'", where=where, fix=_nearest(key, known))


def reject_similar(given: Iterable[str], known: Iterable[str], where: str | Path | None) -> None:
    """Raises `UserError` for the first key of ``given`` that is another spelling of one of ``known`` (`similar_key`).
    Other keys are accepted: for files that have keys of other programs too."""
    known = list(known)
    for key in given:
        if (near := similar_key(key, known)) is not None:
            raise UserError(f"unknown key '{key}'", where=where, fix=f"did you mean '{near}'?")


def similar_key(key: str, known: Collection[str]) -> str | None:
    """The key of ``known`` of which ``key`` is another spelling: with capitals, hyphens, or a wrong letter. A known key
    with a word before or behind it is a key of its own.

    >>> [similar_key(key, ["msd", "hidden_size"]) for key in ("MSD", "hiden-size", "mm_hidden_size", "msd")]
    ['msd', 'hidden_size', None, None]
    """
    if key in known:
        return None
    plain = key.lower().replace("-", "_").strip("_ ")
    if plain in known:
        return plain
    near = next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=SIMILAR)), None)
    return None if near is None or plain.startswith(f"{near}_") or plain.endswith(f"_{near}") else near


def one_line(error: ValidationError, kind: Any) -> UserError:
    """The first problem that pydantic found in an object of ``kind``, as a `UserError`. Unknown keys come first."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] in unknown), problems[0])
    names = [field.name for field in dataclasses.fields(kind)]
    branch = next((place for place, part in enumerate(first["loc"]) if _UNION_BRANCH.fullmatch(str(part))), None)
    tried = first["loc"][:branch]
    if branch is not None:  # a list or an object of the right kind, with a wrong value inside, says most
        first = next(
            (each for each in problems if each["loc"][:branch] == tried and len(each["loc"]) > branch + 1), first
        )
        inside = first["loc"][branch + 1 :]
        branch = None if inside else branch
        first = {**first, "loc": (*tried, *inside)}
    parts = list(first["loc"])
    if parts and isinstance(parts[0], int) and parts[0] < len(names):  # a positional argument
        parts[0] = names[parts[0]]
    path = ".".join(str(part) for part in parts)
    if first["type"] in unknown:
        return UserError(f"unknown key '{path}'", fix=_nearest(str(parts[-1]), _keys_at(kind, parts[:-1])))
    if first["type"].startswith("missing"):
        return UserError(f"lacks '{path}'", fix="give it a value")
    if not path:
        return UserError(first["msg"])
    if branch is None:
        return UserError(f"{path}={shown(first['input'])}", fix=_wanted(first))
    options = dict.fromkeys(_wanted(each).removeprefix("give ") for each in problems if each["loc"][:branch] == tried)
    return UserError(f"{path}={shown(first['input'])}", fix=f"give {', or '.join(options)}")


def _wanted(problem: Any) -> str:
    """What to give in place of the value that one of pydantic's problems is about."""
    plain = str(problem["msg"]).replace("Input should be", "give").replace("Value error, ", "")
    return _WANTED[problem["type"]].format(**problem.get("ctx", {})) if problem["type"] in _WANTED else plain


def shown(value: Any) -> str:
    """A value in a message."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"


def _keys_at(kind: Any, path: Sequence[int | str]) -> list[str]:
    """Names of the fields of the dataclass at ``path`` inside ``kind``."""
    for part in path:
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(str(part))
        else:  # dict[str, X], tuple[X, ...] or list[X]
            arguments = typing.get_args(kind)
            kind = arguments[1] if typing.get_origin(kind) is dict else next(iter(arguments), None)
        options = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
        kind = next((option for option in options if option is not type(None)), None)  # X of X | None
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []

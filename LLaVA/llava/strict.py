"""Typed, strict settings: a frozen pydantic dataclass whose errors are one `UserError` line.

A wrong type, a value out of bounds or an unknown key is an error. An unknown key's error names the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from .errors import UserError

T = TypeVar("T")
_CONFIG = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


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
            raise one_line(error, [f.name for f in dataclasses.fields(made)]) from None

    made.__init__ = checked
    return made


def read_strict(kind: type[T], given: Any, where: str | Path) -> T:
    """An object of a `strict_dataclass` from the keys of a JSON object.

    Args:
        where: the file or section, named in errors.

    Raises:
        UserError: ``given`` is not an object, or has a wrong, unknown or missing value.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"not a JSON object but {type(given).__name__}", where=where)
    reject_unknown(given, [f.name for f in dataclasses.fields(kind)], where)  # type: ignore[arg-type]
    try:
        return kind(**given)
    except UserError as error:
        raise UserError(error.what, where=where, fix=error.fix) from None


def reject_unknown(given: Iterable[str], known: Iterable[str], where: str | Path | None) -> None:
    """Raises `UserError` for the first key of ``given`` that is not in ``known``. It names the nearest known key."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
            raise UserError(f"unknown key '{key}'", where=where, fix=hint)


def one_line(error: ValidationError, known: Iterable[str] = ()) -> UserError:
    """The first problem of a `ValidationError` as a `UserError`."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(path, list(known), n=1)
        return UserError(f"unknown key '{path}'", fix=f"did you mean '{near[0]}'?" if near else None)
    if first["type"].startswith("missing"):
        return UserError(f"lacks '{path}'", fix="give it a value")
    wanted = first["msg"].replace("Input should be", "give").replace("Value error, ", "")
    return UserError(f"{path}={first['input']!r}", fix=wanted)

"""Strict reading of JSON objects of nested dataclasses: files may be damaged, or written by another program.

Unlike `llava.strict.read_strict`, which reads settings, a field with a default must be there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError

from llava.errors import UserError
from llava.strict import one_line

STRICT = ConfigDict(extra="forbid")
"""Set as ``__pydantic_config__`` of a dataclass: an unknown field is an error."""

Text = InstanceOf[str]  # StrictStr would refuse half of a surrogate pair, which ids of records may have
Count = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]

T = TypeVar("T")


def parse(kind: type[T], value: Any, what: str, path: Path, fix: str) -> T:
    """A JSON object as the dataclass ``kind``, whose fields must all be there, even those with a default.

    Args:
        what: what the object is to the user, for the message ("header of the shard").
        path, fix: of the file, for the message.

    Raises:
        UserError: a field is missing, unknown or has a wrong value.
    """
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    wrong = "" if isinstance(value, Mapping) else "not a JSON object"
    if not wrong and (missing := [name for name in names if name not in value]):
        wrong = f"no {', '.join(missing)}"
    try:
        if not wrong:
            return cast(T, _adapter(cast(Any, kind)).validate_python(value))
    except ValidationError as error:
        wrong = f"{one_line(error, names).what:.80}"
    raise UserError(f"{what} is incomplete or wrong ({wrong})", path, fix)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)

"""What every shard of a corpus shares: the model that its states come from, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llava.errors import UserError

SCHEMA = 2
READABLE = (1, 2)
"""Schema 1 knows no ``hidden_dtype`` and no ``regeneration``: states are 16 bit, answers those of the data set."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"


@dataclass(frozen=True)
class Regeneration:
    """How the target made answers of its own.

    ``draft``: hub name, or name of the folder; None for plain decoding. ``draft_fingerprint``: as that of the model.
    ``temperature``: 0 is greedy. ``seed``: None for greedy decoding. ``max_new_tokens``: longest answer.
    """

    draft: str | None
    draft_fingerprint: str | None
    temperature: float
    seed: int | None
    max_new_tokens: int

    def __str__(self) -> str:
        how = f"temperature {self.temperature:g}, seed {self.seed}" if self.temperature else "greedy"
        return f"{how}, at most {self.max_new_tokens} tokens, {f'draft {self.draft}' if self.draft else 'no draft'}"


@dataclass(frozen=True)
class Source:
    """What every shard of a corpus shares.

    ``model``: hub name, or name of the folder. ``commit``: of the model, if known. ``dtype``: 16 bit, of the states as
    they are read. ``fingerprint``: of a part of the model's weights, see `eagle.ge_data.extract.fingerprint`.
    ``hidden_dtype``: "int8" where hidden states are stored as `eagle.ge_data.quantise` writes them, None where they are
    stored as ``dtype``. ``regeneration``: where answers are the target's own and not the data set's.
    """

    family: str
    model: str
    commit: str | None
    dtype: str
    hidden_size: int
    vocab_size: int
    image_token_id: int
    fingerprint: str | None = None
    hidden_dtype: str | None = None
    regeneration: Regeneration | None = None

    def differences(self, other: Source) -> str:
        """Where this one differs from ``other``, for a message; "" if they are equal."""
        own, there = asdict(self), asdict(other)
        return ", ".join(f"{name} {own[name]!r} instead of {there[name]!r}" for name in own if own[name] != there[name])


def read_source(value: Mapping[str, Any], path: Path, fix: str) -> Source:
    """The `Source` in the header of a shard or in an index; fields that its schema does not know have their defaults.

    Args:
        path, fix: of the file, for messages.

    Raises:
        UserError: a field is missing or of a kind that no program of ours writes.
    """
    text = ("family", "model", "dtype")
    numbers = ("hidden_size", "vocab_size", "image_token_id")
    optional = ("commit", "fingerprint", "hidden_dtype")
    wrong = [name for name in text if not isinstance(value.get(name), str)]
    wrong += [name for name in numbers if type(value.get(name)) is not int or value[name] < 0]
    wrong += [name for name in optional if not isinstance(value.get(name), str | None)]
    if not wrong and value["dtype"] not in DTYPES:
        wrong.append("dtype")
    if not wrong and value.get("hidden_dtype") not in (None, INT8):
        wrong.append("hidden_dtype")
    if wrong:
        found = ", ".join(f"{name} {value.get(name)!r}" for name in wrong)
        raise UserError(f"source of the states is incomplete or wrong ({found})", path, fix)
    given: dict[str, Any] = {name: value.get(name) for name in (*text, *numbers, *optional)}
    return Source(**given, regeneration=_read_regeneration(value.get("regeneration"), path, fix))


def _read_regeneration(value: Any, path: Path, fix: str) -> Regeneration | None:
    if value is None:
        return None
    kinds: dict[str, Any] = {
        "draft": str | None,
        "draft_fingerprint": str | None,
        "temperature": int | float,
        "seed": int | None,
        "max_new_tokens": int,
    }
    right = isinstance(value, Mapping) and value.keys() == kinds.keys()
    if not right or any(not isinstance(value[name], kind) for name, kind in kinds.items()):
        raise UserError(f"record of the regenerated answers is incomplete or wrong ({value!r})", path, fix)
    return Regeneration(**value)


def check_schema(schema: Any, path: Path) -> None:
    """Raises `UserError` for a schema version that this program does not read."""
    if type(schema) is not int or schema not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise UserError(f"shards of schema version {schema}, this program reads {known}", path, "make the corpus again")

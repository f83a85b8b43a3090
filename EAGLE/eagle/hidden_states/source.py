"""What every shard of a corpus shares: the model that its states come from, and how they are stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eagle.hidden_states.validation import Check, count, number, one_of, optional, record, shown, text, wrong_fields
from llava.errors import UserError

SCHEMA = 4
READABLE = (1, 2, 3, 4)
"""Schema 1 knows no ``hidden_dtype`` and no ``regeneration``: states are 16 bit, answers those of the data set. Shards
have the grids of their pictures since `GRIDS_SINCE`, and ``layer_fingerprint`` since schema 4."""
GRIDS_SINCE = 3

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
    they are read. ``fingerprint``: of the token embedding, see `eagle.ge_data.extract.fingerprint`;
    ``layer_fingerprint``: of the language model's last layer, which a fine-tune with a frozen embedding changes.
    ``hidden_dtype``: "int8" where hidden states are stored as `eagle.hidden_states.quantise` writes them, None where
    they are stored as ``dtype``. ``regeneration``: where answers are the target's own and not the data set's.
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
    layer_fingerprint: str | None = None

    def differences(self, other: Source) -> str:
        """Where this one differs from ``other``, for a message; "" if they may share a corpus. What one of them does
        not know (`NOT_ALWAYS_KNOWN`) is no difference."""
        own, there = asdict(self), asdict(other)
        return ", ".join(
            f"{name} {own[name]!r} instead of {there[name]!r}"
            for name in own
            if own[name] != there[name] and not (name in NOT_ALWAYS_KNOWN and None in (own[name], there[name]))
        )

    def completed(self, other: Source | None) -> Source:
        """The same, with what only ``other`` knows."""
        unknown = [name for name in NOT_ALWAYS_KNOWN if getattr(self, name) is None]
        return self if other is None else replace(self, **{name: getattr(other, name) for name in unknown})


NOT_ALWAYS_KNOWN = ("commit", "layer_fingerprint")
"""Fields that shards of earlier releases, and of models outside the hub's cache, leave open."""

REGENERATION: dict[str, Check] = {
    "draft": optional(text),
    "draft_fingerprint": optional(text),
    "temperature": number,
    "seed": optional(lambda value: type(value) is int),
    "max_new_tokens": count,
}
FIELDS: dict[str, Check] = {
    "family": text,
    "model": text,
    "commit": optional(text),
    "dtype": one_of(*DTYPES),
    "hidden_size": count,
    "vocab_size": count,
    "image_token_id": count,
    "fingerprint": optional(text),
}
SINCE: dict[int, dict[str, Check]] = {
    2: {"hidden_dtype": one_of(None, INT8), "regeneration": optional(record(REGENERATION))},
    4: {"layer_fingerprint": optional(text)},
}
"""Fields by the schema version that brought them."""


def read_source(value: Any, schema: int, path: Path, fix: str) -> Source:
    """The `Source` in the header of a shard or in an index of this schema version; what it does not know is default.

    Args:
        path, fix: of the file, for messages.

    Raises:
        UserError: a field is missing, unknown, or of a kind that no program of ours writes.
    """
    wanted = dict(FIELDS)
    for version, fields in SINCE.items():
        wanted |= fields if schema >= version else {}
    wrong = wrong_fields(value, wanted)
    if wrong:
        raise UserError(f"source of the states is incomplete or wrong ({wrong})", path, fix)
    regeneration = value.get("regeneration")
    return Source(**{**value, "regeneration": None if regeneration is None else Regeneration(**regeneration)})


def check_schema(schema: Any, path: Path) -> None:
    """Raises `UserError` for a schema version that this program does not read."""
    if type(schema) is not int or schema not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise UserError(
            f"shards of schema version {shown(schema)}, this program reads {known}", path, "make the corpus again"
        )

"""What all shards of a corpus have in common: the model that computed the states, and how they are stored."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, StrictInt

from eagle.hidden_states.validation import STRICT, Count, Number, Text, parse
from llava.arguments import is_greedy
from llava.errors import UserError
from llava.hub import cached_folder

SCHEMA = 5
READABLE = (1, 2, 3, 4, 5)
"""Schema versions that can be read. Shards have the grids of their pictures since version `GRIDS_SINCE`."""
GRIDS_SINCE = 3
NEW_FIELDS = {2: ("hidden_dtype", "regeneration"), 4: ("layer_fingerprint",), 5: ("feature_layers",)}
"""Fields of `Source` by the schema version that introduced them; None in older files."""
SOMETIMES_UNKNOWN = ("commit", "layer_fingerprint")
"""Fields that are None for models outside of the hub's cache and in old shards."""
INT8: Literal["int8"] = "int8"


@dataclass(frozen=True)
class Regeneration:
    """How the target answered the questions itself.

    ``draft``: hub name, or name of the folder; None for plain decoding. ``draft_fingerprint``: of its input layer.
    ``temperature``: 0 is greedy. ``seed``: None for greedy decoding. ``max_new_tokens``: of the longest answer.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    draft: Text | None
    draft_fingerprint: Text | None
    temperature: Number
    seed: StrictInt | None
    max_new_tokens: Count

    def __str__(self) -> str:
        how = "greedy" if is_greedy(self.temperature) else f"temperature {self.temperature:g}, seed {self.seed}"
        return f"{how}, at most {self.max_new_tokens} tokens, {f'draft {self.draft}' if self.draft else 'no draft'}"


@dataclass(frozen=True)
class Source:
    """Where the states of a corpus come from.

    ``model``: hub name, or name of the folder. ``commit``: of the model on the hub, if known. ``dtype``: of the states
    when they are read. ``fingerprint``: of the token embedding, see `eagle.ge_data.extract.fingerprint`.
    ``hidden_dtype``: "int8" for states stored in 8 bit (`eagle.hidden_states.quantise`), None for ``dtype``.
    ``regeneration``: None for the answers of the data set. ``layer_fingerprint``: of the language model's last layer,
    which differs in a fine-tune with a frozen embedding. ``feature_layers``: the layers whose input streams are stored
    too, ascending; None for none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    family: Text
    model: Text
    commit: Text | None
    dtype: Literal["bfloat16", "float16"]
    hidden_size: Count
    vocab_size: Count
    image_token_id: Count
    fingerprint: Text | None = None
    hidden_dtype: Literal["int8"] | None = None
    regeneration: Regeneration | None = None
    layer_fingerprint: Text | None = None
    feature_layers: tuple[Count, ...] | None = None

    def differences(self, other: Source) -> str:
        """Fields that differ from ``other``, for a message; "" if both may share a corpus. A field of
        `SOMETIMES_UNKNOWN` that one of them does not know is not a difference."""
        own, others = asdict(self), asdict(other)
        return ", ".join(
            f"{name} {own[name]!r} instead of {others[name]!r}"
            for name in own
            if own[name] != others[name] and not (name in SOMETIMES_UNKNOWN and None in (own[name], others[name]))
        )

    def completed(self, other: Source | None) -> Source:
        """This source with the fields that only ``other`` knows."""
        unknown = [name for name in SOMETIMES_UNKNOWN if getattr(self, name) is None]
        return self if other is None else replace(self, **{name: getattr(other, name) for name in unknown})


def model_name(model: str) -> str:
    """Hub name of a model, or the name of its folder."""
    return Path(model).resolve().name if os.path.isdir(model) else model


def commit_of(model: str) -> str | None:
    """The commit of a model in the hub's cache, given by hub name or snapshot folder; None for other models."""
    snapshot = Path(model).resolve() if os.path.isdir(model) else cached_folder(model)
    if snapshot is None:
        return None
    known = snapshot.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", snapshot.name)
    return snapshot.name if known else None


def parse_source(value: Any, schema: int, path: Path, fix: str) -> Source:
    """The source in a shard's header or an index of this schema version. ``path``, ``fix``: for the message.

    Raises:
        UserError: a field is missing, unknown or has a wrong value.
    """
    if isinstance(value, Mapping):
        value = {**{name: None for since, names in NEW_FIELDS.items() if schema < since for name in names}, **value}
    return parse(Source, value, "source of the states", path, fix)


def check_schema(value: Any, what: str, path: Path, fix: str) -> int:
    """The schema version of a header or an index. ``what``, ``path``, ``fix``: for the message.

    Raises:
        UserError: there is none, or this program cannot read it.
    """
    if not isinstance(value, Mapping) or "schema" not in value:
        raise UserError(f"{what} is incomplete or wrong (no schema version)", path, fix)
    schema = value["schema"]
    if type(schema) is not int or schema not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise UserError(f"schema version {schema!r:.60}, this program reads {known}", path, "make the corpus again")
    return schema

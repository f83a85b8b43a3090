"""What a suite file declares: models, cells, and who competes in them. Strict: an unknown key is an error.

A cell may list several values of ``temperature``, ``batch``, ``new_tokens`` and ``context``; each combination is a cell
of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.random_pair import Shape
from eagle.drafts.config import reject_unknown
from llava.errors import UserError
from llava.files import read_json

AXES = ("temperature", "batch", "new_tokens", "context")
CONTESTANTS = (
    "autoregressive", "transformers dynamic", "transformers static", "prompt lookup", "assistant", "msd", "msd fixed",
    "msd 5/10/60",
)  # fmt: skip
"""Who competes where a cell does not say; `benchmarks.contestants` builds them."""


@dataclass(frozen=True)
class Pair:
    """A base model with its draft: folders or hub names, or a ``random`` shape, whose figures are costs alone, since a
    random draft guesses nothing."""

    base: str | None = None
    draft: str | None = None
    random: Shape | None = None


@dataclass(frozen=True)
class Cell:
    """One comparison.

    ``model``: key of the suite's models. ``questions``: how many of the data file's. ``new_tokens``: the longest
    answer. ``context``: positions that a prompt has at least, filled up with pictures of other questions (a random
    pair: with random ids); 0 leaves it as it is. ``contestants``: names as in `CONTESTANTS`, any tree as ``msd D/K/N``.
    """

    name: str
    model: str
    questions: int = 8
    batch: int = 1
    temperature: float = 0.0
    new_tokens: int = 128
    context: int = 0
    contestants: tuple[str, ...] = CONTESTANTS

    @property
    def title(self) -> str:
        """Short and unique."""
        context = f", {self.context} positions" if self.context else ""
        return f"{self.name}: T={self.temperature:g}, B={self.batch}, {self.new_tokens} tokens{context}"


@dataclass(frozen=True)
class Suite:
    """A suite file.

    ``rounds`` are counted, ``warm_up`` rounds before them are not. ``dtype`` is everyone's; the plain baselines run in
    ``baseline_dtypes`` too. ``assistant``: ``layers:N`` of the target, or a model. ``lookup``: tokens of prompt lookup.
    ``tolerance``: deviation of a contestant's time from its median that makes a round noisy.
    """

    name: str
    models: dict[str, Pair]
    cells: tuple[Cell, ...]
    data: str | None = None
    rounds: int = 7
    warm_up: int = 2
    dtype: str = "auto"
    baseline_dtypes: tuple[str, ...] = ()
    device_map: str = "auto"
    assistant: str = "layers:4"
    lookup: int = 5
    seed: int = 0
    tolerance: float = 0.15
    where: str = field(default="", compare=False)


def read_suite(path: Path) -> Suite:
    """Reads a suite file (JSON).

    Raises:
        UserError: it cannot be read, a key is unknown or missing, or a cell names a model that is not declared.
    """
    given = _section(read_json(path, "suite file"), path)
    models = {name: _pair(_section(pair, path), path) for name, pair in _section(given.get("models"), path).items()}
    cells = [cell for entry in given.get("cells", ()) for cell in _cells(_section(entry, path), path)]
    if not cells:
        raise UserError("suite has no cells", where=path)
    for cell in cells:
        if cell.model not in models:
            raise UserError(f"cell '{cell.name}' is for the model '{cell.model}', which is not declared", where=path)
    rest = {key: _frozen(value) for key, value in given.items() if key not in ("models", "cells")}
    return _make(Suite, {**rest, "models": models, "cells": tuple(cells), "where": str(path)}, path)


def _pair(section: Mapping[str, Any], where: Path) -> Pair:
    pair = dict(section)
    if pair.get("random") is not None:
        pair["random"] = _make(Shape, _section(pair["random"], where), where)
    made = _make(Pair, pair, where)
    if (made.random is None) == (made.base is None):
        raise UserError("a model of the suite needs 'base' and 'draft', or 'random'", where=where)
    return made


def _cells(entry: Mapping[str, Any], where: Path) -> list[Cell]:
    listed = {axis: entry[axis] if isinstance(entry[axis], list) else [entry[axis]] for axis in AXES if axis in entry}
    one = _make(Cell, {key: _frozen(value) for key, value in entry.items() if key not in AXES}, where)
    values = itertools.product(*listed.values())
    return [replace(one, **dict(zip(listed, combination, strict=True))) for combination in values]


def _make(kind: Any, values: Mapping[str, Any], where: Path) -> Any:
    reject_unknown(values, [each.name for each in fields(kind)], where)
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"suite file is incomplete ({error})", where=where) from None


def _section(value: Any, where: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"suite file has {type(value).__name__} where a section should be", where=where)
    return value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

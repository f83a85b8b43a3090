"""What a suite file declares: models, cells, and their contestants. An unknown key is an error.

A cell may list several values of ``temperature``, ``batch``, ``new_tokens`` and ``context``; each combination becomes a
separate cell.
"""

from __future__ import annotations

import itertools
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from benchmarks.random_pair import Shape
from llava.errors import UserError
from llava.files import read_json
from llava.strict import read_strict, strict_dataclass

AXES = ("temperature", "batch", "new_tokens", "context")
CONTESTANTS = (
    "autoregressive", "transformers dynamic", "transformers static", "prompt lookup", "assistant", "msd", "msd fixed",
    "msd 5/10/60",
)  # fmt: skip
"""Contestants of a cell that does not name any; `benchmarks.contestants` builds them."""


@strict_dataclass
class Pair:
    """A base model with its draft: folders or hub names, or a ``random`` shape, whose figures are costs alone, since a
    random draft guesses nothing."""

    base: str | None = None
    draft: str | None = None
    random: Shape | None = None

    def __post_init__(self) -> None:
        if (self.random is None) == (self.base is None):
            raise UserError("a model of the suite needs 'base' and 'draft', or 'random'")


@strict_dataclass
class Cell:
    """One comparison.

    ``model``: key of the suite's models. ``questions``: how many of the data file's. ``new_tokens``: the longest
    answer. ``context``: positions that a prompt has at least, filled up with pictures of other questions (a random
    pair: with random ids); 0 leaves it as it is. ``contestants``: names as in `CONTESTANTS`, any tree as ``msd D/K/N``,
    and "autoregressive" and all of MSD with " compiled" behind.
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


@strict_dataclass
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
        UserError: it cannot be read, a key is unknown, missing or wrong, or a cell names an undeclared model.
    """
    given = read_json(path, "suite file")
    if isinstance(given, dict) and isinstance(given.get("cells"), list):
        given = {**given, "cells": [cell for entry in given["cells"] for cell in _combinations(entry)]}
    suite = replace(read_strict(Suite, given, path), where=str(path))
    if not suite.cells:
        raise UserError("suite has no cells", where=path)
    for cell in suite.cells:
        if cell.model not in suite.models:
            raise UserError(f"cell '{cell.name}' is for the model '{cell.model}', which is not declared", where=path)
    return suite


def _combinations(entry: Any) -> list[Any]:
    """The cells of one entry of the file: one for each combination of the values that its `AXES` list."""
    if not isinstance(entry, dict):
        return [entry]
    axes = {axis: entry[axis] for axis in AXES if isinstance(entry.get(axis), list)}
    return [{**entry, **dict(zip(axes, values, strict=True))} for values in itertools.product(*axes.values())]

"""The cells of the training study: what differs between them, and the training config of each. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.errors import UserError


@dataclass(frozen=True)
class Cell:
    """One way to train. ``train`` and ``msd``: keys of these sections of the training config that differ."""

    name: str
    what: str
    train: Mapping[str, Any] = field(default_factory=dict)
    msd: Mapping[str, Any] = field(default_factory=dict)


REFERENCE = Cell("two-stage", "text alone, then ever more pictures; decoupled (the recipe)")
CELLS = (
    REFERENCE,
    Cell("not-decoupled", "two-stage; image positions through fc, as EAGLE does", msd={"decoupled": False}),
    Cell("text-only", "no picture in any epoch", {"text_share": 1.0}),
    Cell("image-only", "pictures alone in every epoch", {"text_share": 0.0, "image_start": 1.0, "image_end": 1.0}),
    Cell("mixed", "half pictures, half text in every epoch",
         {"text_share": 0.0, "image_start": 0.5, "image_end": 0.5}),
    Cell("two-stage-k2", "two-stage, two steps on the draft's own outputs", {"rollout_steps": 2}),
    Cell("two-stage-k3", "two-stage, three steps on the draft's own outputs", {"rollout_steps": 3}),
)  # fmt: skip


def choose(names: Sequence[str]) -> list[Cell]:
    """The cells of these names, in the order of `CELLS`; all where none is named."""
    known = {cell.name: cell for cell in CELLS}
    for name in names:
        if name not in known:
            raise UserError(f"no cell '{name}'", where="--cells", fix=f"one of {', '.join(known)}")
    return [cell for cell in CELLS if not names or cell.name in names]


def training_config(base: Mapping[str, Any], cell: Cell, shared: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` (a training config) with what all cells share and what this one has of its own. All cells train one
    step on true hidden states unless they say otherwise."""
    train = {**base.get("train", {}), "rollout_steps": 1, **shared, **cell.train}
    return {**base, "train": train, **({"msd": {**base.get("msd", {}), **cell.msd}} if cell.msd else {})}

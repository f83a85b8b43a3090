"""Fewer image rows in the draft: the rows of a picture are pooled to ``m``, or left out, before the draft reads them.

The target reads every row and verifies, so answers do not change. Without pooling the draft reads as many rows as the
picture has tokens, and attends to all of them at every level of every tree.

A picture is a run of adjacent image rows. Pictures without a row between them count as one, and so does a video. A
picture is cut into ``m`` pieces of adjacent rows, equal up to one row, and each piece becomes the mean of its features.
A picture of ``m`` rows or fewer stays as it is; with ``m = 0`` all go. Text rows stay, with their own hidden states, so
the first one after a picture still reads the state that the target has there.

Positions: a draft with plain positions counts the rows that are left, 0, 1, 2, ..., so a long picture cannot push the
text beyond the positions it was trained on. A draft with M-RoPE positions keeps the target's numbers for text, and a
merged row gets the mean of the three-row positions that it stands for.

Training merges with the same function (`eagle.train.dataset.collate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.errors import UserError


@dataclass(frozen=True)
class Merging:
    """Which row each of R input rows goes into.

    ``group`` [R] row of the result, -1 where it is left out; ``source`` [R'] the last of the rows that go into each row
    of the result, so a text row's own.
    """

    group: Tensor
    source: Tensor

    def pick(self, values: Tensor, dim: int = 0) -> Tensor:
        """[..., R, ...] → [..., R', ...]: of each row of the result the last that goes into it."""
        return values.index_select(dim, self.source.to(values.device))

    def mean(self, values: Tensor) -> Tensor:
        """[R, X] → [R', X] float32, the mean of the rows that go into each."""
        group = self.group.to(values.device)
        kept = group >= 0
        sums = torch.zeros(len(self.source), values.shape[1], device=values.device)
        sums.index_add_(0, group[kept], values[kept].float())
        return sums / group[kept].bincount(minlength=len(self.source)).unsqueeze(1)


@dataclass(frozen=True)
class Compression:
    """``tokens``: rows that a picture keeps at most. None keeps all."""

    tokens: int | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.tokens, int) and not isinstance(self.tokens, bool)
        if self.tokens is not None and (not whole or self.tokens < 0):
            raise UserError(
                f"image tokens of the draft: {self.tokens!r}", fix="give a whole number of at least 0, or 'all'"
            )

    def replaced(self, tokens: Any = None) -> Compression:
        """With what is given in place of what is here. ``tokens``: a number, also as text, or "all"; None is not given.

        Raises:
            UserError: it is neither.
        """
        if tokens is None:
            tokens = self.tokens
        elif tokens == "all":
            tokens = None
        elif isinstance(tokens, str) and tokens.isdigit():
            tokens = int(tokens)
        return Compression(tokens)

    def plan(self, is_image: Tensor, features: Tensor) -> Merging | None:
        """Decides which rows go together; None where nothing changes.

        Args:
            is_image: [R] bool, image rows.
            features: [R, H] input rows; only image rows are read.
        """
        runs = [] if self.tokens is None else [(a, b) for a, b in image_runs(is_image) if b - a > self.tokens]
        if not runs:
            return None
        device = features.device
        pieces, rows, done = [], 0, 0
        for start, end in [*runs, (is_image.shape[0], is_image.shape[0])]:
            pieces.append(torch.arange(rows, rows + start - done, device=device))  # rows that stay as they are
            rows, done = rows + start - done, end
            if end > start:
                labels = self._labels(features[start:end])
                pieces.append(torch.where(labels < 0, labels, labels + rows))
                rows += int(labels.max()) + 1
        group = torch.cat(pieces)  # [R]
        kept = (group >= 0).nonzero().squeeze(1)
        source = torch.zeros(rows, dtype=torch.long, device=device).scatter_reduce(0, group[kept], kept, "amax")
        return Merging(group, source)

    def _labels(self, features: Tensor) -> Tensor:
        """Features [n, H] of one picture, n > m → [n] its merged row of each, counted from 0; -1 with m = 0."""
        count, wanted = features.shape[0], self.tokens or 0
        if wanted == 0:
            return torch.full((count,), -1, device=features.device)
        return torch.arange(count, device=features.device) * wanted // count


def image_runs(is_image: Tensor) -> list[tuple[int, int]]:
    """Runs of true values of [R] as (start, end).

    >>> image_runs(torch.tensor([1, 1, 0, 0, 1]).bool())
    [(0, 2), (4, 5)]
    """
    padded = torch.nn.functional.pad(is_image.int().cpu(), (1, 1))
    steps = padded.diff()  # [R + 1]
    starts, ends = (steps == 1).nonzero().flatten().tolist(), (steps == -1).nonzero().flatten().tolist()
    return list(zip(starts, ends, strict=True))

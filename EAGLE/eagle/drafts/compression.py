"""Fewer image rows in the draft: the rows of a picture are pooled to ``m``, or left out, before the draft reads them.

The target reads every row and verifies, so answers do not change. Without pooling the draft reads as many rows as the
picture has tokens, and attends to all of them at every level of every tree.

A picture is a run of adjacent image rows. Pictures without a row between them count as one, and so does a video. A
picture is cut into ``m`` pieces of adjacent rows, equal up to one row, and each piece becomes the mean of its features.
A picture of ``m`` rows or fewer does not change; with ``m = 0`` all its rows are left out. Text rows stay, with their
own hidden states, so the first one after a picture still reads the target's state there.

Positions: a draft with plain positions counts the rows that are left, 0, 1, 2, ..., so a long picture cannot push the
text beyond the positions it was trained on. A draft with M-RoPE positions keeps the target's numbers for text, and a
merged row gets the mean of the three-row positions that it stands for.

ViSpec heads compress with learnt queries instead (`query_rows`). Training uses the same functions as decoding
(`eagle.train.collate`).
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.arguments import count
from llava.errors import UserError
from llava.strict import shown


@dataclass(frozen=True)
class Merging:
    """Which of R input rows each of R' merged rows stands for.

    ``rows``: [K] the input rows that are not left out, ascending. ``first``: [R'] where those of each merged row begin
    in ``rows``; they end where those of the next one begin. ``source``: [R'] the last of them; for text the row itself.
    """

    rows: Tensor
    first: Tensor
    source: Tensor

    def pick(self, values: Tensor, dim: int = 0) -> Tensor:
        """[..., R, ...] → [..., R', ...], the last input row of each merged row."""
        return values.index_select(dim, self.source.to(values.device))

    def mean(self, values: Tensor) -> Tensor:
        """[R, X] → [R', X] float32, the mean of the input rows of each merged row."""
        rows, first = self.rows.to(values.device), self.first.to(values.device)
        return F.embedding_bag(rows, values.float(), first, mode="mean")  # the same sums each time, also on CUDA


@dataclass(frozen=True)
class Compression:
    """``tokens``: maximal number of rows of a picture. None keeps all."""

    tokens: int | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.tokens, int) and not isinstance(self.tokens, bool)
        if self.tokens is not None and (not whole or self.tokens < 0):
            raise UserError(
                f"image tokens of the draft: {shown(self.tokens)}", fix="give a whole number of at least 0, or 'all'"
            )

    def replaced(self, tokens: Any = None) -> Compression:
        """The same with other ``tokens``: a number, also as text, or "all". None changes nothing.

        Raises:
            UserError: it is none of these.
        """
        if tokens is None:
            tokens = self.tokens
        elif tokens == "all":
            tokens = None
        elif isinstance(tokens, str):
            with suppress(ArgumentTypeError):  # what is left a text is refused below
                tokens = count(tokens)
        return Compression(tokens)

    def plan(self, is_image: Tensor) -> Merging | None:
        """Which of the rows are merged, from ``is_image`` [R] bool. None if no picture is too long."""
        runs = [] if self.tokens is None else [(a, b) for a, b in image_runs(is_image) if b - a > self.tokens]
        if self.tokens is None or not runs:
            return None
        device = is_image.device
        pieces, rows, done = [], 0, 0
        for start, end in [*runs, (is_image.shape[0], is_image.shape[0])]:
            pieces.append(torch.arange(rows, rows + start - done, device=device))  # rows that stay as they are
            rows, done = rows + start - done, end
            if self.tokens == 0:
                pieces.append(torch.full((end - start,), -1, device=device))
            elif end > start:
                pieces.append(rows + torch.arange(end - start, device=device) * self.tokens // (end - start))
                rows += self.tokens
        group = torch.cat(pieces)  # [R]
        kept = (group >= 0).nonzero().squeeze(1)  # [K]
        ends = torch.searchsorted(group[kept], torch.arange(rows, device=device), right=True)  # [R'] in ``kept``
        return Merging(kept, torch.cat([ends.new_zeros(1), ends[:-1]]), kept[ends - 1])


def image_runs(is_image: Tensor) -> list[tuple[int, int]]:
    """Runs of true values of [R] as (start, end).

    >>> image_runs(torch.tensor([1, 1, 0, 0, 1]).bool())
    [(0, 2), (4, 5)]
    """
    padded = torch.nn.functional.pad(is_image.int().cpu(), (1, 1))
    steps = padded.diff()  # [R + 1]
    starts, ends = (steps == 1).nonzero().flatten().tolist(), (steps == -1).nonzero().flatten().tolist()
    return list(zip(starts, ends, strict=True))


class QueryRows(NamedTuple):
    """The R' rows that a head with learnt queries makes of R input rows.

    ``source`` [R']: the input row itself for text, the last one of its picture for an image row. ``places`` [R']:
    position numbers. ``pictures`` [R']: number of the last picture up to a row, counted from 1; 0 before the first.
    ``runs``: (start, end) of each picture's input rows.
    """

    source: Tensor
    places: Tensor
    pictures: Tensor
    runs: list[tuple[int, int]]


def query_rows(is_image: Tensor, queries: int) -> QueryRows:
    """Each picture in ``is_image`` [R] bool has ``queries - 1`` rows, but not more than before, at the last positions
    of its input rows.

    >>> source, places, pictures, _ = query_rows(torch.tensor([0, 1, 1, 1, 1, 0]).bool(), 3)
    >>> source.tolist(), places.tolist(), pictures.tolist()
    ([0, 4, 4, 5], [0, 3, 4, 5], [0, 1, 1, 1])
    """
    count, done, runs = len(is_image), 0, image_runs(is_image)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for number, (start, end) in enumerate([*runs, (count, count)]):
        text = torch.arange(done, start)
        parts.append((text, text, torch.full_like(text, number)))
        if end > start:
            picture = torch.arange(max(start, end - (queries - 1)), end)
            parts.append((torch.full_like(picture, end - 1), picture, torch.full_like(picture, number + 1)))
        done = end
    source, places, pictures = (torch.cat(each).to(is_image.device) for each in zip(*parts, strict=True))
    return QueryRows(source, places, pictures, runs)

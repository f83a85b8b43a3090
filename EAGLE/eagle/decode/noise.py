"""Chance, laid out by place in the answer: one seed gives the same tokens whatever drafts or verifies them.

A token is sampled as the arg-max of its log-probabilities plus Gumbel noise (the Gumbel-max trick; PyTorch's own
sampling of one token is the same race). Row p of the noise belongs to new token p, not to a node of a tree: all nodes
that stand for that place are chosen with the same row, of which one at most becomes a token. So the tree, the draft,
the batch and the length of a cycle change what is computed, but not what is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.errors import UserError

AT_ONCE = 8
"""Places that are drawn together: always whole groups, so that noise does not depend on how far ahead it was wanted."""


def gumbel(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise, float32."""
    waits = torch.empty(*shape, dtype=torch.float32, device=device).exponential_(generator=generator)
    return waits.clamp_(min=torch.finfo(waits.dtype).tiny).log_().neg_()


class Noise:
    """Noise of one sequence, drawn in the order of the places.

    Args:
        generator: random state of this sequence alone; None shares the device's global one.
        device: where tokens are chosen.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device | str) -> None:
        self.generator, self.device = generator, device
        self._first = 0
        self._rows: list[Tensor] = []  # [V] each, from place `_first` on

    def rows(self, first: int, count: int, vocabulary: int) -> Tensor:
        """[count, V] for the places from ``first`` on; those before it are not asked for again."""
        while self._first + len(self._rows) < first + count:
            self._rows += gumbel([AT_ONCE, vocabulary], self.generator, self.device)
        self._rows, self._first = self._rows[first - self._first :], first
        return torch.stack(self._rows[:count])


def mixed(*numbers: int) -> int:
    """A seed of 63 bits made of several numbers, the same on every machine."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeds_of(seed: int | Sequence[int], batch: int) -> list[int]:
    """One seed for each sequence: those given, or the first with ``seed`` itself and the others derived from it.

    Raises:
        UserError: neither one seed nor one for each.
    """
    if isinstance(seed, int):
        return [seed, *(mixed(seed, row) for row in range(1, batch))]
    if len(seed) != batch:
        raise UserError(f"{len(seed)} seeds for {batch} sequences", fix="give one seed, or one for each")
    return list(seed)

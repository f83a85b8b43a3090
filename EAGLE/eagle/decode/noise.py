"""Randomness by position in the answer: a seed gives the same tokens with any draft, tree and batch.

A token is sampled as the arg-max of its log-probabilities plus Gumbel noise (the Gumbel-max trick). Row p of the noise
belongs to new token p, not to a node of a tree. All nodes for that position share the row, and at most one of them
becomes a token. So the draft, the tree, the batch and the length of a cycle do not change the sampled tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.errors import UserError
from llava.inputs import checked_seed

AT_ONCE = 8
"""Positions are drawn in whole groups of this size, so noise does not depend on how many are requested."""


def gumbel(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise, float32."""
    waits = torch.empty(*shape, dtype=torch.float32, device=device).exponential_(generator=generator)
    return waits.clamp_(min=torch.finfo(waits.dtype).tiny).log_().neg_()


class Noise:
    """Noise of one sequence, drawn in the order of positions.

    Args:
        generator: random state of this sequence. None uses the device's global one.
        device: where tokens are sampled.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device | str) -> None:
        self.generator, self.device = generator, device
        self._first = 0
        self._rows: list[Tensor] = []  # [V] each, from position `_first`

    def rows(self, first: int, count: int, vocabulary: int) -> Tensor:
        """[count, V] for the positions from ``first``. Earlier ones are dropped."""
        while self._first + len(self._rows) < first + count:
            self._rows += gumbel([AT_ONCE, vocabulary], self.generator, self.device)
        self._rows, self._first = self._rows[first - self._first :], first
        return torch.stack(self._rows[:count])


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits from several numbers, the same on every machine."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeds_of(seed: int | Sequence[int], batch: int) -> list[int]:
    """One seed for each sequence: those given, or ``seed`` for the first and seeds derived from it for the others.

    Raises:
        UserError: the number of seeds is not that of the sequences.
    """
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        first = checked_seed(seed)
        return [first, *(derived_seed(first, index) for index in range(1, batch))]
    if len(seed) != batch:
        raise UserError(f"{len(seed)} seeds for {batch} sequences", fix="give one seed, or one for each")
    return [checked_seed(each) for each in seed]

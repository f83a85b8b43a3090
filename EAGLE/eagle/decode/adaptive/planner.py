"""Chooses depth and size of the next draft tree, for the most expected tokens per second.

A cycle with a tree of ``n`` nodes and ``l`` drafted levels takes ``extend + l * step + verify(n)`` seconds
(`CostCurve`) and gives one token and every accepted node. A drafted node of path probability ``s`` (the product of the
draft's probabilities from the root) is accepted with a probability near ``s``; a correction is learnt from earlier
cycles (`Acceptance`). This gives the expected tokens per second of every size before anything is verified. Another
level is drafted if the accepted nodes that it should add are worth the time of its step. If even the best tree is
slower than plain decoding, the planner pauses and tries again later.

Greedy output does not depend on these choices. This module does arithmetic on the host only and knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EDGES = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8, 0.9)
"""Limits between the ranges of path probability. Each range has a correction of its own."""
TRUST = 2.0
"""Weight of the draft's own probability at first, in expected acceptances."""
MEMORY = 400.0
"""Expected acceptances in a range after which its counts are halved."""
CORRECTION = (0.2, 3.0)
"""Bounds of the correction, a factor on the draft's probability."""
RECENT = 0.9
"""Weight of the past in the running averages of a request."""
LOSS = 0.97
"""A request pauses if its speed is below this fraction of plain decoding's."""
PAUSES = (8, 16, 32, 64)
"""Cycles of plain decoding in the first, second, ... pause."""
AHEAD = 4
"""Levels to look ahead when another one is considered: several may be worth their time where one is not."""
TRIAL = 4
"""Cycles with trees before a request may pause, and after each pause."""


@dataclass(frozen=True)
class CostCurve:
    """Seconds on one machine. ``nodes``, ``verify``: time of a verification by number of nodes, linear in between;
    ``step``: one more drafted level; ``extend``: the draft reads the accepted rows and drafts the first level."""

    nodes: tuple[int, ...]
    verify: tuple[float, ...]
    step: float
    extend: float

    def verification(self, largest: int) -> Floats:
        """Seconds for 1, 2, ..., ``largest`` nodes."""
        return np.interp(np.arange(1, largest + 1), self.nodes, self.verify)


class Acceptance:
    """How often nodes are accepted: their path probability times a factor learnt for its range."""

    def __init__(self) -> None:
        self._expected = np.full(len(EDGES) + 1, TRUST)
        self._accepted = np.full(len(EDGES) + 1, TRUST)
        self._edges = np.array(EDGES)

    def probability(self, scores: Floats) -> Floats:
        """``scores`` cumulative log-probabilities → chance that each node is accepted."""
        drafted = np.exp(scores)
        factor = (self._accepted / self._expected).clip(*CORRECTION)
        corrected: Floats = np.minimum(drafted * factor[self._edges.searchsorted(drafted)], 1.0)
        return corrected

    def learn(self, scores: Floats, accepted: Sequence[int]) -> None:
        """Learns from verified nodes with these scores, of which those with the indices ``accepted`` were accepted. Old
        counts weigh less: a range keeps about `MEMORY` expected acceptances."""
        drafted = np.exp(scores)
        full = self._expected > MEMORY
        self._expected[full], self._accepted[full] = self._expected[full] / 2, self._accepted[full] / 2
        ranges = self._edges.searchsorted(drafted)
        np.add.at(self._expected, ranges, drafted)
        np.add.at(self._accepted, ranges[list(accepted)], 1.0)


class Choice(NamedTuple):
    """A tree of ``nodes`` nodes, with the expected ``tokens`` and ``seconds`` of its cycle."""

    nodes: int
    tokens: float
    seconds: float

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Planner:
    """Decisions for one sequence.

    Args:
        cost: of this machine.
        largest: nodes of the largest tree, root included.
        acceptance: from earlier requests; this sequence adds to it.
    """

    cost: CostCurve
    largest: int
    acceptance: Acceptance = field(default_factory=Acceptance)

    def __post_init__(self) -> None:
        self._verify = self.cost.verification(self.largest)
        self._levels: list[Floats] = []
        self._steps, self._drafted = 0, False
        self._tokens, self._seconds = 0.0, 0.0
        self._cycles, self._pause, self._pauses = 0, 0, 0

    def should_draft(self) -> bool:
        """Starts a cycle. Returns whether it drafts."""
        self._levels, self._steps = [], 0
        self._drafted = self._pause == 0
        self._pause = max(0, self._pause - 1)
        return self._drafted

    def should_deepen(self, scores: Floats) -> bool:
        """Whether to draft another level below one with these ``scores`` (all its nodes)."""
        chances = self.acceptance.probability(scores)
        before, now = float(self._levels[-1].sum()) if self._levels else 1.0, float(chances.sum())
        self._levels.append(chances)
        best = self._best(np.concatenate(self._levels))
        shrinks = min(1.0, now / before) if before > 0 else 0.0  # if each level shrinks as this one did
        promised = now * np.cumprod(np.full(AHEAD, shrinks)).cumsum()  # [AHEAD] by one, two, ... levels
        seconds = best.seconds + self.cost.step * np.arange(1, AHEAD + 1)
        pays = bool(((best.tokens + promised) / seconds).max() > best.speed)
        self._steps += pays
        return pays

    def size(self, scores: Floats) -> int:
        """Nodes of the tree to verify, root included, if nodes of these ``scores`` were drafted."""
        return self._best(self.acceptance.probability(scores)).nodes

    def _best(self, chances: Floats) -> Choice:
        """The fastest tree of nodes with these acceptance probabilities; the most probable nodes come first."""
        likely = np.sort(chances)[::-1][: self.largest - 1]
        tokens = 1.0 + np.concatenate([[0.0], likely.cumsum()])
        seconds = self.cost.extend + self.cost.step * self._steps + self._verify[: len(tokens)]
        nodes = int((tokens / seconds).argmax())
        return Choice(nodes + 1, float(tokens[nodes]), float(seconds[nodes]))

    def learn(self, scores: Floats, path: Sequence[int], tokens: int) -> None:
        """Learns from a finished cycle.

        Args:
            scores: of the verified tree's nodes, root first.
            path: accepted nodes, root included.
            tokens: new tokens of the cycle.
        """
        if not self._drafted:
            return
        if len(scores) > 1:
            self.acceptance.learn(scores[1:], [node - 1 for node in path[1:]])
        spent = self.cost.extend + self.cost.step * self._steps + float(self._verify[len(scores) - 1])
        self._tokens = RECENT * self._tokens + tokens
        self._seconds = RECENT * self._seconds + spent
        self._cycles += 1
        if self._cycles >= TRIAL and self._tokens / self._seconds < LOSS / self._verify[0]:
            self._pause = PAUSES[min(self._pauses, len(PAUSES) - 1)]
            self._pauses, self._cycles = self._pauses + 1, 0
            self._tokens, self._seconds = 0.0, 0.0

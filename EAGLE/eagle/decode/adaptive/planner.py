"""How deep and how large the next draft tree should be: as much as pays on this machine, for this text.

A cycle with a tree of ``n`` nodes and ``l`` drafted levels takes ``extend + l * step + verify(n)`` seconds
(`CostCurve`) and gives one token and every accepted node. A drafted node of path probability ``s`` (the product of the
draft's probabilities from the root) is accepted about ``s`` times; how far that is off is learnt from the cycles before
(`Acceptance`). So the expected tokens per second of every size are known before anything is verified, and the best
size is taken. Another level is drafted if the node mass that it should add pays for its step. Where even the best tree
is slower than plain decoding the planner pauses, and tries again later.

Greedy output does not depend on any of it. Pure host arithmetic, nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EDGES = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8, 0.9)
"""Limits between the ranges of path probability that are corrected apart."""
TRUST = 2.0
"""Expected acceptances that the draft's own probability is worth at first."""
MEMORY = 400.0
"""Expected acceptances in a range after which what is learnt there is halved."""
CORRECTION = (0.2, 3.0)
"""Bounds of what is learnt, as a factor on the draft's probability."""
RECENT = 0.9
"""Weight of the past in the running averages of a request."""
LOSS = 0.97
"""Speed against plain decoding below which a request pauses."""
PAUSES = (8, 16, 32, 64)
"""Cycles of plain decoding after the first, second, ... time that speculation lost."""
AHEAD = 4
"""Levels that are looked ahead when another one is considered: one alone may not pay where several do."""
TRIAL = 4
"""Cycles with trees before a request may pause, and after each pause."""


@dataclass(frozen=True)
class CostCurve:
    """Seconds on one machine. ``nodes``, ``verify``: a verification of so many nodes takes so long, linear in between;
    ``step``: one more drafted level; ``extend``: the draft reads the accepted rows and drafts the first level."""

    nodes: tuple[int, ...]
    verify: tuple[float, ...]
    step: float
    extend: float

    def verification(self, largest: int) -> Floats:
        """Seconds for 1, 2, ..., ``largest`` nodes."""
        return np.interp(np.arange(1, largest + 1), self.nodes, self.verify)


class Acceptance:
    """How often nodes of a path probability are accepted: the probability times a factor learnt for its range."""

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
        """Nodes of these scores were verified, and those with the indices ``accepted`` were accepted. What was long ago
        counts less: a range remembers about `MEMORY` expected acceptances."""
        drafted = np.exp(scores)
        full = self._expected > MEMORY
        self._expected[full], self._accepted[full] = self._expected[full] / 2, self._accepted[full] / 2
        ranges = self._edges.searchsorted(drafted)
        np.add.at(self._expected, ranges, drafted)
        np.add.at(self._accepted, ranges[list(accepted)], 1.0)


class Choice(NamedTuple):
    """A tree of ``nodes`` nodes, the ``tokens`` it should give and the ``seconds`` its cycle should take."""

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
        acceptance: what was learnt before; this sequence adds to it.
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
        """Starts a cycle: whether it drafts at all."""
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
        shrinks = min(1.0, now / before) if before > 0 else 0.0  # each level as this one did
        promised = now * np.cumprod(np.full(AHEAD, shrinks)).cumsum()  # [AHEAD] by one, two, ... levels
        seconds = best.seconds + self.cost.step * np.arange(1, AHEAD + 1)
        pays = bool(((best.tokens + promised) / seconds).max() > best.speed)
        self._steps += pays
        return pays

    def size(self, scores: Floats) -> int:
        """Nodes of the tree to verify, root included, if nodes of these ``scores`` were drafted."""
        return self._best(self.acceptance.probability(scores)).nodes

    def _best(self, chances: Floats) -> Choice:
        """The fastest tree of nodes with these chances: the most probable ones are taken first."""
        likely = np.sort(chances)[::-1][: self.largest - 1]
        tokens = 1.0 + np.concatenate([[0.0], likely.cumsum()])
        seconds = self.cost.extend + self.cost.step * self._steps + self._verify[: len(tokens)]
        nodes = int((tokens / seconds).argmax())
        return Choice(nodes + 1, float(tokens[nodes]), float(seconds[nodes]))

    def learn(self, scores: Floats, path: Sequence[int], tokens: int) -> None:
        """A cycle has ended.

        Args:
            scores: of the verified tree's nodes, root first.
            path: accepted nodes, root included.
            tokens: given by the cycle.
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

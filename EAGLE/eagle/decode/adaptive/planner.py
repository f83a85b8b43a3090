"""Chooses depth and size of the next draft tree, for the most expected tokens per second.

A cycle with a tree of ``n`` nodes and ``l`` drafted levels takes ``extend + l * step + verify(n)`` seconds
(`CostCurve`) and gives one token and every accepted node. A drafted node of path probability ``s`` (the product of the
draft's probabilities from the root) is accepted with a probability near ``s``; a correction is learnt from earlier
cycles (`Acceptance`). This gives the expected tokens per second of every size before anything is verified. Another
level is drafted if the accepted nodes that it should add are worth the time of its step. The costs are corrected by the
durations of real cycles, which also say whether to draft at all (`eagle.decode.adaptive.guard`).

Greedy output does not depend on these choices. This module does arithmetic on the host only and knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eagle.decode.adaptive.guard import CHANGE, Guard, Pace, Work, ratio

Floats = NDArray[np.float64]

EDGES = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8, 0.9)
"""Limits between the ranges of path probability. Each range has a correction of its own."""
TRUST = 2.0
"""Weight of the draft's own probability at first, in expected acceptances."""
MEMORY = 400.0
"""Expected acceptances in a range after which its counts are halved."""
CORRECTION = (0.2, 3.0)
"""Bounds of the correction, a factor on the draft's probability."""
AHEAD = 4
"""Levels to look ahead when another one is considered: several may be worth their time where one is not."""


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
        pace: real durations, from earlier requests too.
    """

    cost: CostCurve
    largest: int
    acceptance: Acceptance = field(default_factory=Acceptance)
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self._verify = self.cost.verification(self.largest)
        self.guard = Guard(self.pace, self.cost.verify[0])
        self._levels: list[Floats] = []
        self._steps = 0
        self._slower: tuple[float, Floats] = 1.0, np.ones(self.largest)

    def should_draft(self) -> bool:
        """Starts a cycle. Returns whether it drafts."""
        self._levels, self._steps = [], 0
        pace = self.pace
        draft, verify, plain = (rounded(ratio(part)) if part else 1.0 for part in (pace.draft, pace.verify, pace.plain))
        self._slower = draft, np.array([plain] + [verify] * (self.largest - 1))
        return self.guard.should_draft()

    def should_deepen(self, scores: Floats) -> bool:
        """Whether to draft another level below one with these ``scores`` (all its nodes)."""
        chances = self.acceptance.probability(scores)
        before, now = float(self._levels[-1].sum()) if self._levels else 1.0, float(chances.sum())
        self._levels.append(chances)
        best = self._best(np.concatenate(self._levels))
        shrinks = min(1.0, now / before) if before > 0 else 0.0  # if each level shrinks as this one did
        promised = now * np.cumprod(np.full(AHEAD, shrinks)).cumsum()  # [AHEAD] by one, two, ... levels
        seconds = best.seconds + self._slower[0] * self.cost.step * np.arange(1, AHEAD + 1)
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
        draft, verify = self._slower
        seconds = draft * self._drafting + (verify * self._verify)[: len(tokens)]
        nodes = int((tokens / seconds).argmax())
        return Choice(nodes + 1, float(tokens[nodes]), float(seconds[nodes]))

    @property
    def _drafting(self) -> float:
        """Expected seconds of this cycle's draft phase."""
        return self.cost.extend + self.cost.step * self._steps

    def learn(self, scores: Floats, path: Sequence[int], tokens: int, real: Work, drafted: bool) -> None:
        """Learns from a finished cycle.

        Args:
            scores: of the verified tree's nodes, root first.
            path: accepted nodes, root included.
            tokens: new tokens of the cycle.
            real: its durations.
            drafted: what `should_draft` said.
        """
        if len(scores) > 1:
            self.acceptance.learn(scores[1:], [node - 1 for node in path[1:]])
        expected = Work(self._drafting if drafted else 0.0, float(self._verify[len(scores) - 1]))
        self.guard.learn(real, expected, tokens)


def rounded(factor: float) -> float:
    """``factor`` in steps of `CHANGE`, so that small differences between two runs do not change their trees."""
    return CHANGE ** round(math.log(factor, CHANGE))

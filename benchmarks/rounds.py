"""Rounds of one cell: everyone in turn, noise found and marked, medians.

A round is: each contestant answers all the cell's questions. The next round begins with another contestant, so nobody
is always first. Every round is the same work (a fixed seed where tokens are sampled), so what a contestant's time
deviates from its own median is the machine's doing; a round in which somebody's does by more than the tolerance is
noisy. Medians are of the quiet rounds; where they are fewer than half, of all, and the cell is marked.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from eagle.benchmark import Answer, Work
from eagle.decode.stats import Stats


@dataclass
class Runner:
    """A contestant in one cell. ``plain``: it may be the baseline that speed-up is counted from. ``rounds``: all
    questions together, a round each; ``tokens``: its answers in the newest round."""

    name: str
    answer: Callable[[Work], Answer]
    plain: bool = False
    rounds: list[Stats] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def run(self, work: Sequence[Work]) -> Stats:
        """Answers everything once."""
        total, self.tokens = Stats.empty(), []
        for each in work:
            answer = self.answer(each)
            total.merge(answer.stats)
            self.tokens += answer.tokens
        return total

    def median(self, value: Callable[[Stats], float], rounds: Sequence[int]) -> float:
        """Of ``value`` over the given rounds."""
        return statistics.median(value(self.rounds[number]) for number in rounds)

    def spread(self, value: Callable[[Stats], float], rounds: Sequence[int]) -> float:
        """Interquartile range over the given rounds, relative to the median; the whole range of fewer than four."""
        values = sorted(value(self.rounds[number]) for number in rounds)
        if len(values) >= 4:
            low, _, high = statistics.quantiles(values, n=4)
        else:
            low, high = values[0], values[-1]
        return (high - low) / statistics.median(values)


@dataclass(frozen=True)
class Quiet:
    """``rounds`` that count, ``noisy`` ones, and whether the noisy ones are too many to leave out."""

    rounds: tuple[int, ...]
    noisy: tuple[int, ...]
    doubtful: bool


def interleave_rounds(
    runners: Sequence[Runner], work: Sequence[Work], warm_up: int, rounds: int
) -> Iterator[tuple[int, float | None]]:
    """Runs ``warm_up`` rounds that are not counted, then ``rounds`` that are. Yields after each of all these the number
    of the round (below 0: warm-up) and the machine's load average, None where it does not tell."""
    for number in range(-warm_up, rounds):
        shift = number % len(runners)
        for runner in [*runners[shift:], *runners[:shift]]:
            stats = runner.run(work)
            if number >= 0:
                runner.rounds.append(stats)
        yield number, os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def find_quiet(runners: Sequence[Runner], tolerance: float) -> Quiet:
    """Which rounds to believe."""
    count = len(runners[0].rounds)
    noisy = set()
    for runner in runners:
        middle = statistics.median(stats.seconds for stats in runner.rounds)
        limits = middle / (1 + tolerance), middle * (1 + tolerance)
        noisy |= {n for n, stats in enumerate(runner.rounds) if not limits[0] <= stats.seconds <= limits[1]}
    quiet = tuple(number for number in range(count) if number not in noisy)
    doubtful = 2 * len(quiet) < count
    return Quiet(tuple(range(count)) if doubtful else quiet, tuple(sorted(noisy)), doubtful)

"""95 % bootstrap intervals over questions (or rounds)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 2000


class Interval(NamedTuple):
    """A figure and its 95 % interval. ``low`` and ``high`` are None if the run did not record its spread."""

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Interval) -> bool | None:
        """Whether the intervals overlap; None if one of them is not known."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high


def of_mean(values: Sequence[float]) -> Interval | None:
    """The mean of ``values``; None without values, no interval of a single one."""
    return of_ratio([(value, 1.0) for value in values])


def of_ratio(pairs: Sequence[tuple[float, float]]) -> Interval | None:
    """The ratio of the sums of both sides, such as tokens and seconds of each question.

    >>> of_ratio([(2.0, 1.0), (4.0, 2.0)])
    Interval(value=2.0, low=2.0, high=2.0)
    """
    import numpy as np

    numbers = np.array(pairs, dtype=float).reshape(-1, 2)  # [n, 2]
    if not numbers[:, 1].sum() > 0:
        return None
    value = float(numbers[:, 0].sum() / numbers[:, 1].sum())
    if len(numbers) < 2:
        return Interval(value)
    draws = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))  # [RESAMPLES, n]
    sums = numbers[draws].sum(axis=1)  # [RESAMPLES, 2]
    sums = sums[sums[:, 1] > 0]
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return Interval(value, float(low), float(high))

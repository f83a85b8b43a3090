"""95 % bootstrap intervals over questions, or over rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


def bootstrap(rows: Sequence[Sequence[float]], figure: Callable[[Any], Any]) -> Interval | None:
    """A figure of the sums of ``rows`` [n, k], and its interval when rows are drawn again; no interval for one row.

    Args:
        figure: from sums [..., k] to figures [...].

    Returns:
        None without rows, or if the figure is not finite.
    """
    import numpy as np

    numbers = np.array(rows, dtype=float)
    if not len(numbers):
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(figure(numbers.sum(axis=0)))
        if not np.isfinite(value):
            return None
        if len(numbers) < 2:
            return Interval(value)
        draws = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
        made = figure(numbers[draws].sum(axis=1))  # [RESAMPLES]
    low, high = np.quantile(made[np.isfinite(made)], [0.025, 0.975])
    return Interval(value, float(low), float(high))


def of_mean(values: Sequence[float]) -> Interval | None:
    """The mean of ``values``.

    >>> of_mean([2.0, 2.0])
    Interval(value=2.0, low=2.0, high=2.0)
    """
    return of_ratio([(value, 1.0) for value in values])


def of_ratio(pairs: Sequence[tuple[float, float]]) -> Interval | None:
    """The ratio of the sums of both sides, such as tokens and seconds of each question."""
    return bootstrap(pairs, lambda sums: sums[..., 0] / sums[..., 1])


def of_speedup(own: Sequence[tuple[float, float]], plain: Sequence[tuple[float, float]]) -> Interval | None:
    """The ratio of two speeds of totals; both have (tokens, seconds) of the same questions."""
    rows = [(*one, *other) for one, other in zip(own, plain, strict=True)]
    return bootstrap(rows, lambda sums: sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3]))

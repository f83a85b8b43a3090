"""What a process has measured since the last log: sums of `METRICS` and the time that its steps took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from torch import Tensor


class Meter:
    """``steps`` optimizer steps since the last log, and their ``sums`` [6] of `METRICS`, None where there is none. Its
    clock stands until `go`."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.steps = 0
        self._seconds = 0.0
        self._started: float | None = None

    def add(self, metrics: Tensor) -> None:
        """Adds ``metrics`` [6] of one step."""
        self.sums = metrics if self.sums is None else self.sums.to(metrics.device) + metrics
        self.steps += 1

    def finite(self) -> bool:
        """Whether all values since the last log are numbers."""
        return self.sums is None or bool(self.sums.isfinite().all())

    @property
    def seconds(self) -> float:
        """Time that the clock has gone since the last log."""
        return self._seconds + (0.0 if self._started is None else perf_counter() - self._started)

    def go(self) -> None:
        """Lets the clock go."""
        self._started = perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock, for validations and checkpoints."""
        self.finite()  # waits for the steps that a GPU has still to do
        self._seconds, self._started = self.seconds, None
        yield
        self.go()

    def clear(self) -> None:
        """Begins anew, after a log."""
        self.sums, self.steps, self._seconds = None, 0, 0.0
        self.go()

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        sums = None if self.sums is None else self.sums.cpu()
        return {"sums": sums, "steps": self.steps, "seconds": self.seconds}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over ``state``, with the clock standing.

        Raises:
            ValueError, TypeError, LookupError: it is none of `state`'s.
        """
        sums, steps, seconds = state["sums"], int(state["steps"]), float(state["seconds"])
        if (sums is None) != (steps == 0) or not (sums is None or isinstance(sums, Tensor)):
            raise ValueError("sums and steps do not fit")
        self.sums, self.steps, self._seconds, self._started = sums, steps, seconds, None

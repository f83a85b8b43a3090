"""What a run of decoding reports: acceptance, phases and time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PHASES = ("prefill", "draft", "tree", "verify", "accept", "commit")


@dataclass
class Stats:
    """Counters of one request, or of many after `merge`.

    ``new_tokens``: tokens given to the caller. ``cycles``: trees verified; a forward over a batch counts once for each
    sequence. ``requests``: sequences. ``accept_lengths``: drafted tokens accepted in each cycle, before any cut at the
    end of the answer. ``phases``: seconds in each phase. ``cut_trees``: times that memory did not suffice to verify a
    tree, and half of it was verified.
    """

    new_tokens: int = 0
    cycles: int = 0
    requests: int = 1
    seconds: float = 0.0
    accept_lengths: list[int] = field(default_factory=list)
    tree_sizes: list[int] = field(default_factory=list)
    cut_trees: int = 0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to phase ``name``. On an asynchronous device it measures the launch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] += time.perf_counter() - start

    def record_cycle(self, accepted: int, nodes: int) -> None:
        """One tree of ``nodes`` nodes was verified and ``accepted`` of its drafted tokens were kept."""
        self.cycles += 1
        self.accept_lengths.append(accepted)
        self.tree_sizes.append(nodes)

    @property
    def tau(self) -> float:
        """New tokens per verification, the bonus token included. A prompt's first token comes from the prefill."""
        return (self.new_tokens - self.requests) / self.cycles if self.cycles else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def phases_ms(self) -> dict[str, float]:
        return {name: seconds * 1000 for name, seconds in self.phases.items()}

    @property
    def histogram(self) -> dict[int, int]:
        """Number of cycles by accepted drafted tokens."""
        return dict(sorted(Counter(self.accept_lengths).items()))

    def merge(self, other: Stats) -> None:
        """Adds another request's counters to these."""
        self.new_tokens += other.new_tokens
        self.cycles += other.cycles
        self.requests += other.requests
        self.seconds += other.seconds
        self.accept_lengths += other.accept_lengths
        self.tree_sizes += other.tree_sizes
        self.cut_trees += other.cut_trees
        for name, seconds in other.phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    @classmethod
    def empty(cls) -> Stats:
        """A sum with nothing in it yet."""
        return cls(requests=0)

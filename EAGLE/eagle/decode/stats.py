"""Statistics of decoding: acceptance, phases and time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PHASES = ("prefill", "draft", "tree", "verify", "accept", "commit")
OUTSIDE = "outside"
"""Everything else: preparation by transformers' `generate` (which encodes pictures), set-up, gaps between phases."""


@dataclass
class Stats:
    """Counters of one request, or of many after `merge`.

    ``new_tokens``: tokens given to the caller. ``cycles``: trees verified; a forward over a batch counts once for each
    sequence. ``requests``: sequences. ``accept_lengths``: drafted tokens accepted in each cycle, before any cut at the
    end of the answer. ``phases``: seconds in each phase. ``first_token``: seconds from the request until it has its
    first token (a batch: until each sequence has one). ``first_token_at``: that moment on the clock of
    `time.perf_counter`. ``loop``: seconds in cycles. ``seconds`` include both.
    ``cut_trees``: how often memory ran out in verification and the tree was halved. ``wait``: called at both ends of a
    phase, so the work of an asynchronous device counts for its own phase. It costs speed.
    """

    new_tokens: int = 0
    cycles: int = 0
    requests: int = 1
    seconds: float = 0.0
    accept_lengths: list[int] = field(default_factory=list)
    tree_sizes: list[int] = field(default_factory=list)
    cut_trees: int = 0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    first_token: float = 0.0
    first_token_at: float = field(default=0.0, repr=False, compare=False)
    loop: float = 0.0
    wait: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to phase ``name``. Without ``wait`` an asynchronous device is not measured
        exactly: most phases only launch work, and a phase that reads a result waits for all of it."""
        if self.wait is not None:
            self.wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.wait is not None:
                self.wait()
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
    def accepted_per_cycle(self) -> float:
        """Drafted tokens accepted per verification, without the bonus token."""
        return sum(self.accept_lengths) / self.cycles if self.cycles else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of all cycles in which at least 1, 2, 3, … drafted tokens were accepted."""
        longest = max(self.accept_lengths, default=0)
        return [sum(count >= n for count in self.accept_lengths) / self.cycles for n in range(1, longest + 1)]

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def decoding_seconds(self) -> float:
        """After the first token."""
        return max(0.0, self.seconds - self.first_token)

    @property
    def decoding_speed(self) -> float:
        """Tokens per second after the first one."""
        later = self.new_tokens - self.requests
        return later / self.decoding_seconds if self.decoding_seconds else 0.0

    def shares(self) -> dict[str, dict[str, float]]:
        """Time by phase, as shares that sum to 1: of the whole ``request``, and of its ``cycle``s. Empty if nothing was
        timed."""
        cycle = {name: seconds for name, seconds in self.phases.items() if name != "prefill"}
        parts = {"request": (self.phases, self.seconds), "cycle": (cycle, self.loop)}
        return {
            whole: {name: part / total for name, part in phases.items()}
            | {OUTSIDE: max(0.0, total - sum(phases.values())) / total}
            for whole, (phases, total) in parts.items()
            if total > 0
        }

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
        self.first_token += other.first_token
        self.loop += other.loop
        self.accept_lengths += other.accept_lengths
        self.tree_sizes += other.tree_sizes
        self.cut_trees += other.cut_trees
        for name, seconds in other.phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    @classmethod
    def empty(cls) -> Stats:
        """The start value of a sum with `merge`."""
        return cls(requests=0)

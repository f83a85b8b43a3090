"""Ways to decode the same requests, in turn, and which of the plain ones is the strongest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loguru import logger

from eagle import MSDModel, Stats
from eagle.benchmark import Answer, Contestant, baselines, interleave, strongest, with_engine
from eagle.families import Target

MEASURE = "measure"
"""Value of ``msd_baseline`` that measures the plain ways in this run."""


@dataclass(frozen=True)
class Batch:
    """Requests that are decoded together: ``given`` has model inputs, [B, P], and settings of `generate`."""

    given: dict[str, Any]

    def inputs(self, target: Target) -> dict[str, Any]:
        return {**self.given, **target.complete_inputs(self.given["input_ids"], self.given)}


@dataclass(frozen=True)
class Timed:
    """A batch that counts, with its statistics.

    ``docs``: its documents. ``plain``: statistics of the strongest plain way, ``name``, if it was measured beside MSD.
    ``equal``: MSD's answers that are equal to those of that way; None if they were sampled, or not measured together.
    """

    task: str
    docs: tuple[int, ...]
    stats: Stats
    plain: Stats | None = None
    name: str = ""
    equal: int | None = None


@dataclass
class Turns:
    """Decodes batches in the run's own way and, if ``measured``, in plain ways, one after the other.

    The plain ways are those of `msd bench`: our loop and transformers' `generate`, both compiled too where that is its
    default. Until ``requests`` requests have been answered, all of them answer each batch, after one round that is not
    counted; each batch begins with another way. After that the strongest plain way answers alone, beside MSD if the run
    uses it. Without MSD it is the run's own way.
    """

    model: MSDModel
    use_msd: bool
    measured: bool
    requests: int
    speeds: dict[str, float] = field(default_factory=dict)
    """Tokens per second of each plain way, when the strongest was chosen; empty before."""

    def __post_init__(self) -> None:
        dtype = str(self.model.dtype).removeprefix("torch.")
        name = f"MSD {dtype}" if self.use_msd else f"autoregressive {dtype}"
        self.own = Contestant(name, with_engine(self.model, self.use_msd, {}))
        self.plain: list[Contestant] = []
        self.answered = 0
        self.counted: list[tuple[str, tuple[int, ...], bool]] = []  # task, documents and greediness of each round

    def answer(self, given: dict[str, Any], task: str, docs: Sequence[int], counted: bool = True) -> list[list[int]]:
        """The new tokens of each sequence of a batch.

        Args:
            given: model inputs and settings of `generate`.
            counted: False if the batch only fills up a distributed run.
        """
        work = Batch(given)
        if not counted:
            return self.own.answer(work).tokens
        if self.measured and not self.counted:
            self.plain = [with_cycles(way) for way in baselines([self.model], {})]
            if not self.use_msd:
                self.own = self.plain[0]
        ways = [self.own, *(way for way in self.plain if way is not self.own)]
        shift = len(self.counted) % len(ways)
        choosing = len(self.plain) > 1
        for _ in interleave([*ways[shift:], *ways[:shift]], [[work]], warm_up=int(choosing)):
            pass
        tokens = self.own.tokens
        self.counted.append((task, tuple(docs), not given.get("do_sample")))
        self.answered += len(docs)
        if choosing and self.answered >= self.requests:
            self.choose()
        return tokens

    def choose(self) -> None:
        """Keeps the strongest plain way, if there are several."""
        if len(self.plain) < 2:
            return
        self.speeds = {way.name: way.total.tokens_per_second for way in self.plain}
        best = strongest(self.plain)
        self.plain = [best]
        if not self.use_msd:
            self.own = best
        speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in self.speeds.items())
        logger.info(f"strongest plain decoding of the first {self.answered} requests: {best.name} (tokens/s: {speeds})")

    def timed(self) -> list[Timed]:
        """All batches that were counted so far."""
        best = strongest(self.plain) if self.plain else None
        own = best if best is not None and not self.use_msd else self.own
        found, start = [], 0
        for number, (task, docs, greedy) in enumerate(self.counted):
            timed = Timed(task, docs, own.rounds[number])
            if best is not None and self.use_msd:
                rows = slice(start, start := start + len(docs))
                same = sum(a == b for a, b in zip(own.answers[rows], best.answers[rows], strict=True))
                timed = replace(timed, plain=best.rounds[number], name=best.name, equal=same if greedy else None)
            found.append(timed)
        return found


def with_cycles(way: Contestant) -> Contestant:
    """The same plain way, with a cycle for each token after the first one, as our own loop counts them."""
    answer = way.answer

    def counted(work: Any) -> Answer:
        answered = answer(work)
        stats = answered.stats
        if not stats.cycles:
            stats.cycles = stats.new_tokens - stats.requests
            stats.accept_lengths = [0] * stats.cycles
            stats.tree_sizes = [1] * stats.cycles
        return answered

    way.answer = counted
    return way

"""Never slower than plain decoding: decides for each cycle whether it drafts, by the real durations of earlier cycles.

The durations are kept in proportion to expected ones, for three parts: drafting, the verification of a tree, and a
plain cycle (the verification of one token). Load on the machine, a longer context or a larger batch changes the three
in different ways. From them and from the recent tokens per cycle follows the speed-up over plain decoding:

- Below `LOSS` the request pauses: it decodes plainly, for so long that what was lost is at most the share `ALLOWED`.
  Then one cycle drafts, and if that does not pay, the next pause begins. A pause ends early if plain decoding has
  become faster, because then the machine has changed, or so slow that drafting should pay.
- Now and then a single plain cycle measures what plain decoding costs now: when the drafting cycles have become slower
  or faster since it was last measured (a few cycles later if the speed-up is high), and otherwise the more often, the
  closer the speed-up is to 1.

Answers do not depend on these decisions. This module does arithmetic on the host only and knows no model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

LOSS, REGAIN = 0.98, 1.05
"""Speed-up below which a request pauses, and above which a pause ends."""
ALLOWED = 0.025
"""Share of the time of plain decoding that drafting may lose."""
PAUSES = (8, 512)
"""Bounds of the length of a pause, in cycles."""
MEDIAN = 3
"""Durations of a part that count: single ones vary too much."""
RECENT = 0.9
"""Weight of the past in the sums of tokens and expected durations."""
FORGET = 0.5
"""Weight of these sums after a pause."""
CHANGE = 1.25
"""Factor by which durations change before older ones are out of date."""
FAST, SETTLED = 1.6, 6
"""From this speed-up on, a change is measured only after so many drafting cycles: on a shared core durations change all
the time."""
PROBES = ((1.2, 24), (1.6, 96), (float("inf"), 384))
"""Drafting cycles between two measurements of a plain cycle, for speed-ups below a limit."""
FIRST_TOKENS, FIRST_CYCLES = 7.0, 2.0
"""What is believed at first: so many tokens in so many cycles. A good draft may begin with a useless cycle."""


class Work(NamedTuple):
    """Seconds of one cycle: ``draft`` for the draft phase (0 without one), ``verify`` for verification."""

    draft: float
    verify: float

    @property
    def sum(self) -> float:
        return self.draft + self.verify


NOTHING = Work(0.0, 0.0)


def latest(durations: tuple[float, ...], new: float) -> tuple[float, ...]:
    """The last `MEDIAN` of them."""
    return (*durations, new)[-MEDIAN:]


def ratio(durations: Iterable[float]) -> float:
    """Their median."""
    return statistics.median_low(durations)


@dataclass
class Pace:
    """Durations and acceptance of cycles with the same number of sequences, known from all requests of a model.

    Requests of several threads share it, so durations are replaced as a whole and are never empty again.

    Attributes:
        draft, verify, plain: the last `MEDIAN` durations in proportion to expected ones.
        tokens: new tokens of a sequence in recent cycles that drafted, a decaying sum.
        expected: durations of the same cycles.
        drafting_at_probe: `drafting` when a plain cycle was last measured.
        since_probe: cycles that drafted since then.
        begun: kinds of cycles that there were ("draft", "plain"). The first one of a kind is not measured: it may
            compile or prepare something.
    """

    draft: tuple[float, ...] = ()
    verify: tuple[float, ...] = ()
    plain: tuple[float, ...] = ()
    tokens: float = FIRST_TOKENS
    expected: Work = NOTHING
    drafting_at_probe: float = 0.0
    since_probe: int = 0
    begun: set[str] = field(default_factory=set)

    @property
    def drafting(self) -> float:
        """Durations of recent cycles that drafted, in proportion to expected ones."""
        return self.seconds / self.expected.sum

    @property
    def seconds(self) -> float:
        """The recent cycles that drafted would take so long now (a decaying sum)."""
        return ratio(self.draft) * self.expected.draft + ratio(self.verify) * self.expected.verify


@dataclass
class Guard:
    """Decisions for one request.

    Args:
        pace: of the number of sequences that are being decoded.
        plain: expected seconds of a plain cycle. If there is no expectation, expect 1 for each part.
    """

    pace: Pace
    plain: float = 1.0

    def __post_init__(self) -> None:
        self._drafted, self._resumed = False, False
        self._pause, self._paused = 0, 0  # cycles that a pause still has, and has had
        self._lost, self._plain_at_pause = 0.0, 0.0  # the first in plain cycles

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return self.pace.tokens * self.plain * ratio(self.pace.plain) / self.pace.seconds

    @property
    def wants_draft(self) -> bool:
        """Whether a cycle should draft, by what is known now."""
        return not self._pause and not self._probe_due()

    def wants_another(self, unknown: int) -> bool:
        """Whether a cycle should draft while the durations of ``unknown`` cycles are not known yet: drafting has to pay
        clearly for that."""
        sure = bool(self.pace.plain and self.pace.verify) and not self._resumed and self.speedup > REGAIN
        return self.wants_draft and (not unknown or sure)

    def should_draft(self) -> bool:
        """Starts a cycle. Returns whether it drafts."""
        self._drafted = self.wants_draft
        return self._drafted

    def learn(self, real: Work, expected: Work, tokens: float) -> None:
        """Learns from a finished cycle, and begins or ends a pause.

        Args:
            real, expected: durations.
            tokens: new tokens of a sequence.
        """
        kind = "draft" if self._drafted else "plain"
        if kind not in self.pace.begun:
            self.pace.begun.add(kind)
        elif self._drafted:
            self._learn_drafted(real, expected, tokens)
        else:
            self._learn_plain(real, expected)

    def _learn_drafted(self, real: Work, expected: Work, tokens: float) -> None:
        pace = self.pace
        draft, verify = real.draft / expected.draft, real.verify / expected.verify
        past = pace.expected if pace.expected.sum else Work(*(FIRST_CYCLES * seconds for seconds in expected))
        pace.expected = Work(*(RECENT * old + new for old, new in zip(past, expected, strict=True)))
        if self._resumed:  # the draft also read the rows of the pause
            pace.draft, pace.verify, self._resumed = (min(draft, ratio(pace.draft)),), (verify,), False
        else:
            pace.draft, pace.verify = latest(pace.draft, draft), latest(pace.verify, verify)
        pace.tokens = RECENT * pace.tokens + tokens
        pace.since_probe += 1
        if not pace.plain:
            return
        self._lost += real.sum / (self.plain * ratio(pace.plain)) - tokens
        if self.speedup >= LOSS:
            self._lost = min(self._lost, 0.0) if self.speedup < 1 else 0.0
        elif pace.since_probe <= 1 or not self._probe_due():  # plain decoding was measured just now, or is known well
            self._pause = max(PAUSES[0], min(round(self._lost / ALLOWED), PAUSES[1]))
            self._paused, self._plain_at_pause = 0, ratio(pace.plain)

    def _learn_plain(self, real: Work, expected: Work) -> None:
        pace = self.pace
        pace.drafting_at_probe, pace.since_probe = pace.drafting, 0
        plain = real.verify / expected.verify
        pace.plain = latest(pace.plain, plain) if self._pause else (plain,)  # out of a pause, others may be out of date
        if not self._pause:
            return
        self._pause, self._paused = self._pause - 1, self._paused + 1
        if self._paused >= MEDIAN - 1 and (self.speedup > REGAIN or self._plain_at_pause > CHANGE * ratio(pace.plain)):
            self._pause = 0
        if not self._pause:
            self._resumed, self._lost = True, 0.0
            pace.tokens, pace.expected = FORGET * pace.tokens, Work(*(FORGET * each for each in pace.expected))

    def _probe_due(self) -> bool:
        """Whether a plain cycle should be measured."""
        pace = self.pace
        if not pace.verify or self._resumed:
            return False
        if not pace.plain:
            return True
        changed = not 1 / CHANGE < pace.drafting / pace.drafting_at_probe < CHANGE
        if changed and pace.since_probe >= (SETTLED if self.speedup >= FAST else 1):
            return True
        return pace.since_probe >= next(cycles for limit, cycles in PROBES if self.speedup < limit)

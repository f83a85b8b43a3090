"""Accounting of time: shares that sum to one, nothing lost between the phases."""

from __future__ import annotations

import pytest

from eagle.decode.stats import Stats


def timed() -> Stats:
    stats = Stats(new_tokens=11, cycles=4, seconds=10.0, first_token=3.0, loop=6.0)
    stats.phases.update(prefill=2.0, draft=1.0, tree=0.5, verify=3.0, accept=0.25, commit=0.25)
    return stats


def test_what_no_phase_has_is_outside() -> None:
    shares = timed().shares()
    assert shares["cycle"]["outside"] == pytest.approx(1.0 / 6.0)
    assert shares["cycle"]["verify"] == pytest.approx(0.5)
    assert shares["request"]["outside"] == pytest.approx(0.3)
    assert all(sum(part.values()) == pytest.approx(1.0) for part in shares.values())


def test_merged_requests_weigh_by_their_time() -> None:
    total = Stats.empty()
    total.merge(timed())
    total.merge(timed())
    assert total.shares() == timed().shares()
    assert (total.seconds, total.first_token, total.loop) == (20.0, 6.0, 12.0)


def test_nothing_timed_gives_no_shares() -> None:
    assert Stats.empty().shares() == {}


def test_speed_after_the_first_token() -> None:
    assert timed().decoding_speed == pytest.approx(10 / 7)


def test_a_phase_waits_for_the_device_at_both_ends() -> None:
    events: list[str] = []
    stats = Stats(wait=lambda: events.append("wait"))
    with stats.phase("verify"):
        events.append("work")
    assert events == ["wait", "work", "wait"]

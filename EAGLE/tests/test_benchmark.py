"""Interleaved comparison: turns, warm-up, noisy rounds and the spread of a contestant."""

from __future__ import annotations

import pytest
import torch

from eagle.benchmark import (
    Answer,
    Contestant,
    find_quiet,
    identical,
    interleave,
    interleave_with_bar,
    new_tokens,
    paired_speedup,
)
from eagle.decode.stats import Stats


def timed(name: str, *seconds: float) -> Contestant:
    return Contestant(name, lambda work: Answer(Stats(), []), rounds=[Stats(10, seconds=second) for second in seconds])


def test_a_round_that_deviates_is_left_out() -> None:
    quiet = find_quiet([timed("a", 1.0, 1.0, 1.1, 1.0), timed("b", 2.0, 3.0, 2.0, 2.1)], tolerance=0.15)
    assert (quiet.rounds, quiet.noisy, quiet.doubtful) == ((0, 2, 3), (1,), False)


def test_if_most_rounds_are_noisy_all_count_and_the_result_is_doubtful() -> None:
    quiet = find_quiet([timed("a", 1.0, 2.0, 4.0, 8.0)], tolerance=0.15)
    assert (quiet.rounds, quiet.doubtful) == ((0, 1, 2, 3), True)


def test_everyone_in_turn_and_nobody_always_first() -> None:
    seen: list[str] = []

    def answering(name: str) -> Contestant:
        return Contestant(name, lambda work: (seen.append(name), Answer(Stats(1, seconds=1.0), [[1]]))[1])

    contestants = [answering("a"), answering("b")]
    numbers = list(interleave(contestants, [["w"]] * 2, warm_up=1))
    assert numbers == [-1, 0, 1]
    assert seen == ["b", "a", "a", "b", "b", "a"]
    assert [len(contestant.rounds) for contestant in contestants] == [2, 2], "warm-up is not counted"


def test_the_bar_counts_rounds_and_labels_the_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    """Three rounds of warm-up and two that count."""
    own = Contestant("a", lambda work: Answer(Stats(1, seconds=1.0), [[1]]))
    shown = []
    for number in interleave_with_bar([own], [["w"]] * 2, warm_up=3, title="bench", unit="question"):
        shown.append((number, capsys.readouterr().err))
    last = capsys.readouterr().err
    assert [number for number, _ in shown] == [-3, -2, -1, 0, 1]
    assert "bench, warm-up:   0%" in shown[0][1] and "warm-up" not in shown[3][1] + shown[4][1] + last
    assert "bench: 100%" in last and "2/2" in last and "/5" not in last


def test_new_tokens_end_with_the_end_token() -> None:
    sequences = torch.tensor([[7, 7, 5, 2, 0, 0], [7, 7, 5, 6, 8, 9]])
    assert new_tokens(sequences, 2, (2,)) == [[5, 2], [5, 6, 8, 9]]
    assert new_tokens(sequences, 2, ()) == [[5, 2, 0, 0], [5, 6, 8, 9]]


def test_each_question_is_a_round_and_the_first_ones_warm_up() -> None:
    seen: list[str] = []

    def answer(work: str) -> Answer:
        seen.append(work)
        return Answer(Stats(len(work), seconds=1.0), [[len(work)]])

    contestant = Contestant("a", answer)
    list(interleave([contestant], [["x"], ["yy"], ["z", "zzz"]], warm_up=2))
    assert seen == ["x", "yy", "x", "yy", "z", "zzz"]
    assert [stats.new_tokens for stats in contestant.rounds] == [1, 2, 4]
    assert contestant.total.new_tokens == 7 and contestant.tokens == [[1], [3]]


def test_median_and_spread_of_some_rounds() -> None:
    """Speeds 10, 5, 2.5 and 1.25 tokens per second."""
    contestant = timed("a", 1.0, 2.0, 4.0, 8.0)
    assert contestant.median(lambda stats: stats.seconds, [0, 1, 2]) == 2.0
    assert contestant.spread(lambda stats: stats.seconds, [0, 1, 2]) == pytest.approx((4 - 1) / 2)
    assert contestant.spread() == pytest.approx((8.75 - 1.5625) / 3.75)
    assert timed("a", 1.0).spread() == 0.0


def contestant(name: str, rounds: list[tuple[int, float]], answers: list[list[int]]) -> Contestant:
    """``rounds``: new tokens and seconds of each question."""
    stats = [Stats(tokens, seconds=seconds, first_token=0.5) for tokens, seconds in rounds]
    return Contestant(name, lambda work: Answer(Stats(), []), rounds=stats, answers=answers)


def test_speedup_by_question_counts_each_question_once() -> None:
    """Worked: ratios 2 and 1, so the mean is 1.5, while the totals say 110/60 over 110/105 = 1.75."""
    own = contestant("own", [(100, 50.0), (10, 10.0)], [[1, 2], [3]])
    other = contestant("other", [(100, 100.0), (10, 10.0)], [[1, 2], [4]])
    paired = paired_speedup(own, other)
    assert (
        paired is not None
        and paired.value == pytest.approx(1.5)
        and (paired.low, paired.high) == pytest.approx((1.0, 2.0))
    )
    assert identical(own, other) == 1
    single = contestant("own", [(1, 1.0)], [[1]])
    assert paired_speedup(single, single, lambda stats: stats.decoding_speed) is None


def test_acceptance_by_position_is_a_count_of_cycles() -> None:
    stats = Stats(new_tokens=1 + 3 + 1 + 3 + 2, cycles=4, accept_lengths=[2, 0, 2, 1])
    assert stats.acceptance_by_position == [0.75, 0.5]
    assert (stats.tau, stats.accepted_per_cycle) == (2.25, 1.25)
    assert Stats().acceptance_by_position == [] and Stats().accepted_per_cycle == 0.0

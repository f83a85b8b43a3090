"""The checker tells right answers from wrong ones."""

from __future__ import annotations

from random import Random

import pytest

from pocket.recipe.facts import choice, is_right, number, word
from pocket.recipe.sample import KINDS, ask, draw_picture_data

BRAZIL = "Brazil is drawn in red and its value is 35. Peru is drawn in blue and its value is 20."


@pytest.mark.parametrize(("value", "right"), [(35, True), (40, True), (30, True), (45, False), (20, False)])
def test_number_within_one_grid_step(value: int, right: bool) -> None:
    assert is_right(number("value", "Brazil", value, 5), BRAZIL) is right


def test_number_belongs_to_its_subject() -> None:
    assert is_right(number("value", "Peru", 20), BRAZIL)
    assert not is_right(number("value", "Chile", 20), BRAZIL)
    assert not is_right(number("value", "Per", 20), BRAZIL)


def test_cue_picks_the_second_number() -> None:
    answer = "The line of Cuba starts at 10 and ends at 45, so it rises by 35."
    assert is_right(number("end", "Cuba", 45, 0, "ends at"), answer)
    assert not is_right(number("end", "Cuba", 10, 0, "ends at"), answer)


def test_choice_takes_the_first_option_named() -> None:
    colours = ["red", "blue", "green"]
    assert is_right(choice("colour", "Peru", "blue", colours), BRAZIL)
    assert not is_right(choice("colour", "Peru", "red", colours), BRAZIL)
    assert not is_right(choice("colour", "Peru", "red", colours), "Peru is not there.")


def test_word() -> None:
    assert is_right(word("w", "peru"), BRAZIL)
    assert not is_right(word("w", "per"), BRAZIL)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_states_its_own_facts(kind: str) -> None:
    for seed in range(60):
        rng = Random(seed)
        picture = draw_picture_data(rng, heldout=False, kind=kind)
        for turn in ask(rng, picture, 8):
            assert turn.facts
            assert all(is_right(f, turn.answer) for f in turn.facts), turn


@pytest.mark.parametrize("kind", KINDS)
def test_questions_do_not_state_the_facts(kind: str) -> None:
    for seed in range(40):
        rng = Random(seed)
        for turn in ask(rng, draw_picture_data(rng, heldout=True, kind=kind), 8):
            assert not any(is_right(f, turn.question) for f in turn.facts), turn

"""The prompts of a cell: questions of a file, padded with pictures to a length, or random ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.random_pair import RandomPrompt
from benchmarks.spec import Cell, Suite
from eagle.benchmark import Work
from eagle.decode.msd import MSDModel
from eagle.families.layers import position_limit
from eagle.questions import Group, Question, read_questions
from llava.errors import UserError

SHORTEST = 64
"""Ids of a random prompt in a cell without a context."""


def work_of(cell: Cell, suite: Suite, model: MSDModel, random: bool) -> list[Work]:
    """The cell's batches.

    Raises:
        UserError: there are too few questions for a batch, or the context does not fit the model.
    """
    length = cell.context or SHORTEST
    if random:
        check_length(length + cell.new_tokens, cell, suite, model)
        return [RandomPrompt(length, cell.batch, suite.seed + number) for number in range(cell.questions // cell.batch)]
    if suite.data is None:
        raise UserError("suite names no question file", suite.where, "add 'data'")
    every = read_questions(Path(suite.data))
    questions = every[: cell.questions]
    if len(questions) < cell.batch:
        raise UserError(f"{len(questions)} questions are fewer than a batch of {cell.batch}", suite.where)
    if cell.context:
        pictures = [image for question in every for image in question.images]
        questions = [longer(question, pictures, cell.context, model) for question in questions]
    longest = max(positions_of(each, model) for each in questions)
    check_length(longest + cell.new_tokens, cell, suite, model)
    if cell.batch == 1:
        return list(questions)
    starts = range(0, len(questions) - cell.batch + 1, cell.batch)
    return [Group(tuple(questions[start : start + cell.batch])) for start in starts]


def check_length(positions: int, cell: Cell, suite: Suite, model: MSDModel) -> None:
    """Raises if the cell needs more positions than the model has."""
    limit = position_limit(model.target.config.get_text_config())
    if limit is not None and positions > limit:
        raise UserError(
            f"cell '{cell.name}' needs {positions} positions, the model has {limit}", suite.where, "a shorter context"
        )


def longer(question: Question, pictures: Sequence[Path], positions: int, model: MSDModel) -> Question:
    """The question with further ``pictures`` before its own, so that its prompt has at least so many ``positions``."""
    if not pictures:
        raise UserError("no pictures to fill a context with", fix="a question file with pictures")
    images = question.images
    while (have := positions_of(replace(question, images=images), model)) < positions:
        # by the average so far, at least one more
        more = max(1, (positions - have) * len(images) // have)
        images = (*itertools.islice(itertools.cycle(pictures), more), *images)
    return replace(question, images=images)


def positions_of(question: Question, model: MSDModel) -> int:
    """Positions of the question's prompt."""
    count: int = question.inputs(model.target)["input_ids"].shape[1]
    return count

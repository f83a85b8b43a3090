"""The target answers the questions of conversations itself; its answers take the place of the data set's.

Several conversations go on together, turn by turn: what each is told depends on itself alone (but for rounding).
Ids stay those that the target said: they are never turned into text and back. Which tokens count in the loss::

    question                    no
    what the target said        yes
    end of turn, said by it     yes: it is what the draft has to predict there
    end of turn, not said       no: the answer ran into a limit, or ended with another end token. It stands in the
                                sequence, as later questions follow an ended turn, but the target did not say it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eagle.conversations import Unusable
from eagle.decode.msd import MSDModel
from eagle.decode.noise import mixed
from eagle.decode.sampling import SamplingSettings
from eagle.families.template import Outline, Prepared, Template, Turn
from eagle.hidden_states.source import Regeneration
from llava.errors import OutOfMemory
from llava.memory import is_out_of_memory


@dataclass
class Talk:
    """A conversation that is being answered.

    ``row``: its number in the annotation file; ``ids`` and ``spoken`` so far; ``pictures`` that they show; ``said``
    tokens of answers; ``reason`` why it cannot be used.
    """

    outline: Outline
    row: int
    ids: list[int] = field(default_factory=list)
    spoken: list[bool] = field(default_factory=list)
    pictures: int = 0
    said: int = 0
    full: bool = False
    reason: str | None = None

    def ask(self, number: int, max_length: int) -> bool:
        """Takes up the question of a turn; false where there is none, or no room for an answer."""
        if self.full or self.reason is not None or number >= len(self.outline.turns):
            return False
        turn = self.outline.turns[number]
        self.full = len(self.ids) + len(turn.asked) >= max_length
        if self.full:
            return False
        self.ids += turn.asked
        self.spoken += [False] * len(turn.asked)
        self.pictures += turn.pictures
        return True

    def hear(self, turn: Turn, answer: list[int], ends: set[int]) -> None:
        """Takes up what the target said to the last question, at least one id."""
        ended = answer[-1:] == turn.end[:1]
        if answer[-1] in ends:
            answer.pop()
        self.ids += answer + turn.end
        self.spoken += [True] * len(answer)
        self.spoken += [ended and place == 0 for place in range(len(turn.end))]
        self.said += len(answer)


class Regenerator:
    """Turns outlines into conversations with the target's own answers.

    Args:
        model: the target, with a draft or without.
        template: of the target's family.
        settings: how answers are chosen, and their longest length.
        max_length: longest conversation; the turn that reaches it is the last.
        at_once: conversations that are answered together, fewer where memory does not suffice.
    """

    def __init__(
        self, model: MSDModel, template: Template, settings: Regeneration, max_length: int, at_once: int = 1
    ) -> None:
        self.model, self.template, self.settings, self.max_length = model, template, settings, max_length
        self.at_once = at_once

    def answered(self, outlines: Sequence[Outline], rows: Sequence[int]) -> Iterator[tuple[int, Prepared | Unusable]]:
        """Each conversation with an answer to every question that has room for one, those of like length together.

        Args:
            rows: their numbers in the annotation file. Samples are drawn from this, the turn and the seed alone, so
                that they do not depend on the order of the work.

        Yields:
            Place in ``outlines``, and what became of it. It is `Unusable` if not even the first question has room, all
            answers are empty, the target says an image token, or memory does not suffice for it alone.
        """
        order = sorted(range(len(outlines)), key=lambda place: sum(len(turn.asked) for turn in outlines[place].turns))
        for start in range(0, len(order), self.at_once):
            places = order[start : start + self.at_once]
            talks = [Talk(outlines[place], rows[place]) for place in places]
            self._converse(talks)
            yield from zip(places, map(self._outcome, talks), strict=True)

    def _converse(self, talks: Sequence[Talk]) -> None:
        """All turns of some conversations."""
        for number in range(max(len(talk.outline.turns) for talk in talks)):
            self._turn([talk for talk in talks if talk.ask(number, self.max_length)], number)

    def _turn(self, talks: Sequence[Talk], number: int) -> None:
        """One answer to each of these conversations; in halves where memory does not suffice."""
        if not talks:
            return
        try:
            answers = self._answers(talks, number)
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
                raise
            answers = None
        if answers is None:  # after the handler, which held the failed forward's tensors
            if len(talks) == 1:
                talks[0].reason = "too_large"
                return
            half = len(talks) // 2
            self._turn(talks[:half], number)
            self._turn(talks[half:], number)
            return
        for talk, answer in zip(talks, answers, strict=True):
            if self.template.media_ids.isdisjoint(answer):
                turn = talk.outline.turns[number]
                talk.hear(turn, answer, self._ends(turn))
            else:
                talk.reason = "answer_picture"

    def _answers(self, talks: Sequence[Talk], number: int) -> list[list[int]]:
        """What the target says to each, with its end token if it comes to it: at least one id."""
        images = [self.template.first_pictures(talk.outline.images, talk.pictures) for talk in talks]
        inputs: dict[str, Any] = self.template.request([talk.ids for talk in talks], images)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        limits = [min(self.max_length - len(talk.ids), self.settings.max_new_tokens) for talk in talks]
        ends = self._ends(talks[0].outline.turns[number])
        settings = self._sampling([talk.row for talk in talks], number)
        settings |= {"max_new_tokens": max(limits), "eos_token_id": sorted(ends)}
        output = self.model.generate(**inputs, **settings)
        return [answer[:limit] for answer, limit in zip(output.tokens, limits, strict=True)]

    def _ends(self, turn: Turn) -> set[int]:
        """Tokens that end an answer: those of the target, and the one that closes the turn."""
        return {*self.model.target.eos_token_ids, *turn.end[:1]}

    def _sampling(self, rows: Iterable[int], turn: int) -> dict[str, Any]:
        """Settings of `MSDModel.generate` for answers to one turn."""
        seeds = [mixed(self.settings.seed or 0, row, turn) for row in rows]
        return SamplingSettings(self.settings.temperature, seed=seeds).for_engine()

    def _outcome(self, talk: Talk) -> Prepared | Unusable:
        if talk.reason is None and not talk.said:
            talk.reason = "empty" if talk.ids else "answer_cut"
        if talk.reason is not None:
            return Unusable(talk.reason)
        images = self.template.first_pictures(talk.outline.images, talk.pictures)
        kept = slice(self.max_length)
        return Prepared(talk.outline.id, torch.tensor(talk.ids[kept]), torch.tensor(talk.spoken[kept]), images)

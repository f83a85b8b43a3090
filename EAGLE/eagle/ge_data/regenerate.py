"""The target answers the questions of conversations itself.

Several conversations are answered together, turn by turn. An answer depends only on its own conversation (except for
rounding). Its token ids are kept: they are never decoded and encoded again. Which tokens the loss counts::

    question                        no
    answer                          yes
    end of turn, generated          yes: the draft must predict it there
    end of turn, not generated      no: the answer reached a limit or ended with another end token. The end of turn is
                                    in the sequence because the next question follows it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from eagle.conversations import Unusable
from eagle.decode.msd import MSDModel
from eagle.decode.noise import derived_seed
from eagle.decode.sampling import SamplingSettings
from eagle.families.template import Prepared, PromptOutline, Template, Turn
from eagle.hidden_states.source import Regeneration
from llava.memory import halved_within_memory


@dataclass
class ConversationState:
    """A conversation that is being answered.

    ``number``: of its record in the annotation file; ``ids``, ``loss_mask``: of the sequence so far; ``pictures``:
    number of pictures in it; ``answer_tokens``: number of tokens in answers; ``full``: no further question fits;
    ``unusable``: why it cannot be used, a key of `eagle.conversations.REASONS`.
    """

    outline: PromptOutline
    number: int
    ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    pictures: int = 0
    answer_tokens: int = 0
    full: bool = False
    unusable: str | None = None

    def add_question(self, turn_number: int, max_length: int) -> bool:
        """Appends the question of a turn; False if there is none, or no space for an answer."""
        if self.full or self.unusable is not None or turn_number >= len(self.outline.turns):
            return False
        turn = self.outline.turns[turn_number]
        self.full = len(self.ids) + len(turn.asked) >= max_length
        if self.full:
            return False
        self.ids += turn.asked
        self.loss_mask += [False] * len(turn.asked)
        self.pictures += turn.pictures
        return True

    def add_answer(self, turn: Turn, answer: list[int], ends: set[int]) -> None:
        """Appends the target's answer (at least one id) to the last question. ``ends``: ids that end an answer."""
        ended = answer[-1:] == turn.end[:1]
        if answer[-1] in ends:
            answer = answer[:-1]
        self.ids += answer + turn.end
        self.loss_mask += [True] * len(answer)
        self.loss_mask += [ended and place == 0 for place in range(len(turn.end))]
        self.answer_tokens += len(answer)


class Regenerator:
    """Turns outlines into conversations with the target's own answers.

    Args:
        model: the target, with or without a draft.
        template: of the target's family.
        settings: how answers are sampled, and their maximal length.
        max_length: of a conversation; the turn that reaches it is the last.
        at_once: number of conversations that are answered together; fewer if memory is not sufficient.
    """

    def __init__(
        self, model: MSDModel, template: Template, settings: Regeneration, max_length: int, at_once: int = 1
    ) -> None:
        self.model, self.template, self.settings, self.max_length = model, template, settings, max_length
        self.at_once = at_once

    def answered(
        self, outlines: Sequence[PromptOutline], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Prepared | Unusable]]:
        """Answers every question for which there is space, conversations of similar length together.

        Args:
            numbers: of the records in the annotation file. Sampling depends only on this number, the turn and the seed,
                not on the order of the work.

        Yields:
            Place in ``outlines``, and the conversation. It is `Unusable` if there is no space for the first question,
            all answers are empty, the target generates an image token, or memory is not sufficient for it alone.
        """
        order = sorted(range(len(outlines)), key=lambda place: sum(len(turn.asked) for turn in outlines[place].turns))
        for start in range(0, len(order), self.at_once):
            places = order[start : start + self.at_once]
            states = [ConversationState(outlines[place], numbers[place]) for place in places]
            for turn_number in range(max(len(state.outline.turns) for state in states)):
                asked = [state for state in states if state.add_question(turn_number, self.max_length)]
                self._answer_turn(asked, turn_number)
            yield from zip(places, map(self._result, states), strict=True)

    def _answer_turn(self, states: Sequence[ConversationState], turn_number: int) -> None:
        """Adds one answer to each conversation, in halves if memory is not sufficient."""
        answers = halved_within_memory(partial(self._generate, turn_number), states)
        for state, answer in zip(states, answers, strict=True):
            turn = state.outline.turns[turn_number]
            if answer is None:
                state.unusable = "too_large"
            elif self.template.media_ids.isdisjoint(answer):
                state.add_answer(turn, answer, self._ends(turn))
            else:
                state.unusable = "answer_picture"

    def _generate(self, turn_number: int, states: Sequence[ConversationState]) -> list[list[int]]:
        """The answers, each with its end token if it was generated: at least one id."""
        images = [self.template.first_pictures(state.outline.images, state.pictures) for state in states]
        inputs: dict[str, Any] = self.template.request([state.ids for state in states], images)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        limits = [min(self.max_length - len(state.ids), self.settings.max_new_tokens) for state in states]
        ends = self._ends(states[0].outline.turns[turn_number])
        settings = self._sampling([state.number for state in states], turn_number)
        settings |= {"max_new_tokens": max(limits), "eos_token_id": sorted(ends)}
        output = self.model.generate(**inputs, **settings)
        return [answer[:limit] for answer, limit in zip(output.tokens, limits, strict=True)]

    def _ends(self, turn: Turn) -> set[int]:
        """Ids that end an answer: the target's, and the one that closes the turn if it is a special token.

        Otherwise that id is the first piece of a text such as "</s>", in a vocabulary that lacks it.
        """
        special = set(self.model.tokenizer.all_special_ids)
        return {*self.model.target.eos_token_ids, *(token for token in turn.end[:1] if token in special)}

    def _sampling(self, numbers: Iterable[int], turn_number: int) -> dict[str, Any]:
        """Settings of `MSDModel.generate` for the answers of one turn."""
        seeds = [derived_seed(self.settings.seed or 0, number, turn_number) for number in numbers]
        return SamplingSettings(self.settings.temperature, seed=seeds).for_engine()

    def _result(self, state: ConversationState) -> Prepared | Unusable:
        if state.unusable is None and not state.answer_tokens:
            state.unusable = "empty" if state.ids else "answer_cut"
        if state.unusable is not None:
            return Unusable(state.unusable)
        images = self.template.first_pictures(state.outline.images, state.pictures)
        ids, loss_mask = (torch.tensor(values[: self.max_length]) for values in (state.ids, state.loss_mask))
        return Prepared(state.outline.id, ids, loss_mask, images)

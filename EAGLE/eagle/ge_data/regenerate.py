"""The target answers the questions of a conversation itself; its answers take the place of the data set's.

Ids stay those that the target said: they are never turned into text and back. Which tokens count in the loss::

    question                    no
    what the target said        yes
    end of turn, said by it     yes: it is what the draft has to predict there
    end of turn, not said       no: the answer ran into a limit, or ended with another end token. It stands in the
                                sequence, as later questions follow an ended turn, but the target did not say it
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from eagle.ge_data.conversations import Unusable
from eagle.ge_data.source import Regeneration
from eagle.ge_data.template import Outline, Prepared, Template
from eagle.model.msd import MSDModel
from llava.memory import is_out_of_memory


class Regenerator:
    """Turns outlines into conversations with the target's own answers.

    Args:
        model: the target, with a draft or without.
        template: of the target's family.
        settings: how answers are chosen, and their longest length.
        max_length: longest conversation; the turn that reaches it is the last.
    """

    def __init__(self, model: MSDModel, template: Template, settings: Regeneration, max_length: int) -> None:
        self.model, self.template, self.settings, self.max_length = model, template, settings, max_length

    def answered(self, outline: Outline, row: int) -> Prepared:
        """The conversation with an answer to each question that has room for one.

        Args:
            row: its number in the annotation file. Samples are drawn from this, the turn and the seed alone, so that
                they do not depend on the order of the work.

        Raises:
            Unusable: not even the first question has room, every answer is empty, the target says an image token, or
            memory does not suffice.
        """
        ids: list[int] = []
        spoken: list[bool] = []
        pictures, said = 0, 0
        for number, turn in enumerate(outline.turns):
            room = self.max_length - len(ids) - len(turn.asked)
            if room < 1:
                break
            ids += turn.asked
            pictures += turn.pictures
            images = self.template.first_pictures(outline.images, pictures)
            ends = {*self.model.target.eos_token_ids, *turn.end[:1]}
            settings = {"max_new_tokens": min(room, self.settings.max_new_tokens), "eos_token_id": sorted(ends)}
            answer = self._answer(ids, images, {**settings, **self._sampling(row, number)})
            ended = answer[-1:] == turn.end[:1]
            if answer[-1] in ends:
                answer.pop()
            if not self.template.media_ids.isdisjoint(answer):
                raise Unusable("answer_picture")
            ids += answer + turn.end
            spoken += [False] * len(turn.asked) + [True] * len(answer)
            spoken += [ended and place == 0 for place in range(len(turn.end))]
            said += len(answer)
        if not said:
            raise Unusable("empty" if ids else "answer_cut")
        images = self.template.first_pictures(outline.images, pictures)
        kept = slice(self.max_length)
        return Prepared(outline.id, torch.tensor(ids[kept]), torch.tensor(spoken[kept]), images)

    def _answer(self, ids: list[int], images: dict[str, Tensor], settings: dict[str, Any]) -> list[int]:
        """What the target says to the conversation ``ids``, with its end token if it comes to it: at least one id."""
        inputs: dict[str, Any] = self.template.request(ids, images)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        try:
            output = self.model.generate(**inputs, **settings)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise Unusable("too_large") from None
        return output.sequences[0, len(ids) :].tolist()

    def _sampling(self, row: int, turn: int) -> dict[str, Any]:
        """Settings of `MSDModel.generate` for one answer."""
        if self.settings.temperature == 0:
            return {"temperature": 0.0}
        seed = answer_seed(self.settings.seed or 0, row, turn)
        return {"temperature": self.settings.temperature, "top_p": 1.0, "top_k": 0, "seed": seed}


def answer_seed(seed: int, row: int, turn: int) -> int:
    """A seed of 63 bits for one answer, the same on every machine."""
    digest = hashlib.sha256(f"{seed} {row} {turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

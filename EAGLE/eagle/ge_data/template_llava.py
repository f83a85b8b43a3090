"""LLaVA-1.5's conversation template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

import llava
from eagle.ge_data.conversations import MARK, Conversation, Unusable
from eagle.ge_data.template import Encoded, Segment, Template, mark_first
from llava.conversation import get_template
from llava.errors import UserError


class LlavaTemplate(Template):
    """LLaVA-1.5: ``<system> USER: <question> ASSISTANT: <answer></s>USER: ...``."""

    family = "llava"

    @property
    def least_picture_tokens(self) -> int:
        return self.processor.image_token_count

    @staticmethod
    def load_processor(model: str) -> Any:
        return llava.load_processor(model)

    def segments(self, conversation: Conversation) -> list[Segment]:
        written = get_template(self.processor.template, conversation.system)
        segments, before = [], ""
        for question, answer in conversation.turns:
            written.append(0, mark_first(question))
            written.append(1, None)
            asked = written.prompt()
            written.messages[-1] = (written.roles[1], answer)
            answered = written.prompt()
            segments += [Segment(asked[len(before) :], False), Segment(answered[len(asked) :], True)]
            before = answered
        return segments

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> Encoded:
        try:
            ids = self.processor.encode(prompt)
        except UserError:  # characters that only the image id could stand for
            raise Unusable("text") from None
        try:
            images = {"pixel_values": self.processor.pixel_values(list(pictures))} if pictures else {}
        except UserError:
            raise Unusable("broken_picture") from None
        return Encoded(ids, self._spans(prompt, ids), images)

    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        return {"pixel_values": images["pixel_values"][:count]} if count else {}

    def _spans(self, prompt: str, ids: list[int]) -> list[tuple[int, int]]:
        """The processor tokenises the pieces between the marks, each by itself; so places are found piece by
        piece."""
        spans = [(0, 0)] * len(self.processor.encode(""))
        offset = 0
        for number, piece in enumerate(prompt.split(MARK)):
            if number:
                spans += [(offset, offset + len(MARK))] * self.processor.image_token_count
                offset += len(MARK)
            spans += [(offset + start, offset + end) for start, end in self._piece_spans(piece, ids, len(spans))]
            offset += len(piece)
        return spans

    def _piece_spans(self, piece: str, ids: list[int], place: int) -> list[tuple[int, int]]:
        backend = self.processor.tokenizer.backend_tokenizer
        for lead in ("", " "):  # the processor may give a piece a second leading space, see its `encode`
            encoding = backend.encode(lead + piece, add_special_tokens=False)
            after = ids[place + len(encoding.ids) :]
            if ids[place : place + len(encoding.ids)] == encoding.ids and after[:1] in ([], [self.image_token_id]):
                shift = len(lead)
                return [(max(start - shift, 0), max(end - shift, 0)) for start, end in encoding.offsets]
        raise Unusable("text")

"""LLaVA-1.5's conversation template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

import llava
from eagle.conversations import Conversation, Unusable
from eagle.families.template import Encoded, Segment, Template, mark_first
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
            ids, spans = self.processor.encode_with_spans(prompt)
        except UserError:  # characters that only the image id could stand for
            raise Unusable("text") from None
        try:
            images = {"pixel_values": self.processor.pixel_values(list(pictures))} if pictures else {}
        except UserError:
            raise Unusable("broken_picture") from None
        return Encoded(ids, spans, images)

    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        return {"pixel_values": images["pixel_values"][:count]} if count else {}

"""LLaVA-1.5's training template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

import llava
from eagle.conversations import Unusable
from eagle.families.template import Encoded, Template
from llava.errors import UserError


class LlavaTemplate(Template):
    """LLaVA-1.5: the checkpoint's own chat template, else ``<system> USER: <question> ASSISTANT: <answer></s>``."""

    @property
    def least_picture_tokens(self) -> int:
        return self.processor.image_token_count

    @staticmethod
    def load_processor(model: str) -> Any:
        return llava.load_processor(model)

    def write(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        return self.processor.write_turns(turns, system)

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

"""LLaVA-1.6 (LlavaNext) as target: a picture is cut into tiles, so its number of tokens follows its size."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlavaNextForConditionalGeneration

from eagle.families.base import Media
from eagle.families.stock import StockTarget, without_marks
from llava.conversation import build_prompt


class LlavaNextTarget(StockTarget):
    """LLaVA-1.6 in the layout of transformers; positions and image features as in LLaVA-1.5."""

    family = "llava_next"
    model_class = LlavaNextForConditionalGeneration
    media = (Media("image", "image_token_id", ("pixel_values", "image_sizes")),)

    def chat_prompt(
        self, question: str, num_images: int = 0, history: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> str:
        if self.processor.chat_template:
            return super().chat_prompt(question, num_images, history, system)
        marks = f"{self.processor.image_token}\n" * num_images
        if not history:
            return build_prompt(marks + question, (), system)
        (first, answer), *rest = [(asked, without_marks(self.processor, answer)) for asked, answer in history]
        return build_prompt(question, [(marks + first, answer), *rest], system)

"""LLaVA-1.6 (LlavaNext) as target: a picture is cut into tiles, so its number of tokens follows its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlavaNextForConditionalGeneration

from eagle.families.llava.target import LlavaTarget
from eagle.families.stock import load_stock, prepare_stock, stock_chat
from llava.conversation import build_prompt


class LlavaNextTarget(LlavaTarget):
    """LLaVA-1.6 in the layout of transformers."""

    family = "llava_next"
    model_types = ("llava_next",)
    image_inputs = ("pixel_values", "image_sizes")

    @classmethod
    def load(cls, path: str, **kwargs: Any) -> LlavaNextTarget:
        return cls(*load_stock(LlavaNextForConditionalGeneration, path, **kwargs))

    def prepare(self, prompt: str | Sequence[str], images: Sequence[Any] = ()) -> dict[str, Any]:
        return dict(prepare_stock(self.processor, prompt, images).to(self.device))

    def chat_prompt(
        self, question: str, num_images: int = 0, history: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> str:
        if self.processor.chat_template:
            return stock_chat(self.processor, question, num_images, history, system)
        return build_prompt(f"{self.processor.image_token}\n" * num_images + question, history, system)

"""LLaVA-1.5 as target: plain positions, one block of image features per picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llava
from eagle.families.base import Target
from llava.processor import IMAGE_TOKEN


class LlavaTarget(Target):
    """LLaVA-1.5, both public layouts."""

    family = "llava"

    @classmethod
    def load(cls, path: str, **kwargs: Any) -> Target:
        model, processor = llava.load_pretrained(path, **kwargs)
        return cls(model, processor)

    @property
    def image_mark(self) -> str:
        return IMAGE_TOKEN

    def prepare(self, prompt: str | Sequence[str], images: Sequence[Any] = ()) -> dict[str, Any]:
        batch = self.processor(text=prompt, images=images, return_tensors="pt").to(self.device)
        return dict(batch)

    def chat_prompt(
        self, question: str, num_images: int = 0, history: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> str:
        if history:
            (first, answer), *rest = history
            history, num_images = [(f"{IMAGE_TOKEN}\n" * num_images + first, answer), *rest], 0
        return self.processor.chat_prompt(question, num_images=num_images, history=history, system=system)

"""LLaVA-1.5 as target: plain positions, one block of image features per picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import llava
from eagle.families.base import Target, gather_image_features, place_features


class LlavaTarget(Target):
    """LLaVA-1.5, both public layouts."""

    family = "llava"
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    @classmethod
    def load(cls, path: str, **kwargs: Any) -> Target:
        model, processor = llava.load_pretrained(path, **kwargs)
        return cls(model, processor)

    def embed_prompt(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        embeds = self.model.get_input_embeddings()(input_ids)  # [B, S, H]
        features = gather_image_features(
            self.model, inputs, "image", **{name: inputs.get(name) for name in self.image_inputs}
        )
        image_mask = input_ids == self.config.image_token_id
        if inputs.get("attention_mask") is not None:
            image_mask &= inputs["attention_mask"].bool()  # padding may use the same id
        return place_features(embeds, image_mask, features), image_mask

    def prompt_positions(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        attention_mask = inputs.get("attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)  # [B, S]
        return positions, positions[:, -1] + 1

    def text_positions(self, positions: Tensor) -> Tensor:
        return positions

    def prepare(self, prompt: str | Sequence[str], images: Sequence[Any] = ()) -> dict[str, Any]:
        batch = self.processor(text=prompt, images=images, return_tensors="pt").to(self.device)
        return dict(batch)

    def chat_prompt(
        self, question: str, num_images: int = 0, history: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> str:
        return self.processor.chat_prompt(question, num_images=num_images, history=history, system=system)

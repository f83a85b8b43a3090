"""Gemma 3 as target: the tokens of a picture see each other, and most layers have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from eagle.families.base import PromptEmbeds
from eagle.families.stock import StockTarget


class Gemma3Target(StockTarget):
    """Gemma 3 with pictures (4B and larger)."""

    family = "gemma3"
    model_class = Gemma3ForConditionalGeneration

    @property
    def image_mark(self) -> str:
        return self.processor.boi_token

    def read_prompt(self, prompt: PromptEmbeds, positions: Tensor, **arguments: Any) -> Tensor:
        """The masks are those that transformers' `generate` gives the model for such a prompt."""
        cache = self.cache_argument
        arguments["attention_mask"] = self.model.create_masks_for_generate(
            config=self.config,
            inputs_embeds=prompt.embeds,
            attention_mask=arguments.get("attention_mask"),
            position_ids=positions,
            token_type_ids=prompt.image_mask.long(),
            is_first_iteration=True,
            **{cache: arguments.get(cache)},
        )
        return super().read_prompt(prompt, positions, **arguments)

    def complete_inputs(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Token types, without which transformers reads the tokens of a picture as text."""
        if inputs.get("token_type_ids") is not None:
            return {}
        return {"token_type_ids": self.media_mask(self.media[0], input_ids, inputs).long()}

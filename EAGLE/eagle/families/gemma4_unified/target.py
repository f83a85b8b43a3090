"""Gemma 4 without an encoder of pictures: tokens of a picture see each other in all layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Gemma4UnifiedForConditionalGeneration
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma4_unified.modeling_gemma4_unified import get_block_sequence_ids_for_mask

from eagle.families.gemma4.target import Gemma4Target


class Gemma4UnifiedTarget(Gemma4Target):
    """Gemma 4 12B."""

    family = "gemma4_unified"
    model_class = Gemma4UnifiedForConditionalGeneration
    text_types = ("gemma4_unified_text",)

    def prompt_masks(self, is_media: Tensor, **arguments: Any) -> dict[str, Tensor | None]:
        text = self.config.get_text_config()
        if text.use_bidirectional_attention == "vision":
            arguments["block_sequence_ids"] = get_block_sequence_ids_for_mask(is_media.long(), device=is_media.device)
        return create_masks_for_generate(config=text, **arguments)

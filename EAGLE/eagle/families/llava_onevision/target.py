"""LLaVA-OneVision as target: pictures in tiles, several pictures in one tile each, videos with pooled frames."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import transformers
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from eagle.families.base import Media, PromptEmbeds
from eagle.families.stock import StockTarget
from llava.errors import UserError


class LlavaOnevisionTarget(StockTarget):
    """LLaVA-OneVision in the layout of transformers."""

    family = "llava_onevision"
    model_class = LlavaOnevisionForConditionalGeneration
    media = (
        Media("image", "image_token_id", ("pixel_values", "image_sizes", "batch_num_images")),
        Media("video", "video_token_id", ("pixel_values_videos",)),
    )

    def embed_prompt(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> PromptEmbeds:
        video = inputs.get("pixel_values_videos") is not None
        if video and "pixel_values_videos" not in signature(self.model.model.get_video_features).parameters:
            raise UserError(
                f"transformers {transformers.__version__} encodes videos of {self.family} in parts",
                fix="install a newer release of transformers, or leave videos out",
            )
        return super().embed_prompt(input_ids, inputs)

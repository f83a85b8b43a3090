"""LLaVA-OneVision as target: pictures in tiles, several pictures in one tile each, videos with pooled frames."""

from __future__ import annotations

from transformers import LlavaOnevisionForConditionalGeneration

from eagle.families.base import Media
from eagle.families.stock import StockTarget


class LlavaOnevisionTarget(StockTarget):
    """LLaVA-OneVision in the layout of transformers."""

    family = "llava_onevision"
    model_class = LlavaOnevisionForConditionalGeneration
    media = (
        Media("image", "image_token_id", ("pixel_values", "image_sizes", "batch_num_images")),
        Media("video", "video_token_id", ("pixel_values_videos",)),
    )

"""PaddleOCR-VL as target: M-RoPE positions as Qwen2-VL."""

from __future__ import annotations

from transformers import PaddleOCRVLForConditionalGeneration

from eagle.families.base import Media
from eagle.families.qwen2_vl.target import Qwen2VLTarget


class PaddleOCRVLTarget(Qwen2VLTarget):
    """PaddleOCR-VL, pictures only."""

    family = "paddleocr_vl"
    model_class = PaddleOCRVLForConditionalGeneration
    text_types = ("paddleocr_vl_text",)
    media = (Media("image", "image_token_id", ("pixel_values", "image_grid_thw")),)

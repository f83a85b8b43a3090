"""GLM-4.1V to 4.6V and GLM-OCR as target: M-RoPE positions as Qwen2-VL. Frames of a video have the id of a picture."""

from __future__ import annotations

from typing import ClassVar

from transformers import (
    Glm4vForConditionalGeneration,
    Glm4vMoeForConditionalGeneration,
    Glm46VForConditionalGeneration,
    GlmOcrForConditionalGeneration,
)

from eagle.families.base import Media
from eagle.families.qwen2_vl.target import Qwen2VLTarget


class Glm4vTarget(Qwen2VLTarget):
    """GLM-4.1V, pictures only."""

    family = "glm4v"
    model_class = Glm4vForConditionalGeneration
    text_types: ClassVar[tuple[str, ...]] = ("glm4v_text",)
    media = (Media("image", "image_token_id", ("pixel_values", "image_grid_thw")),)


class Glm4vMoeTarget(Glm4vTarget):
    """GLM-4.5V, pictures only."""

    family = "glm4v_moe"
    model_class = Glm4vMoeForConditionalGeneration
    text_types = ("glm4v_moe_text",)


class Glm46VTarget(Glm4vTarget):
    """GLM-4.6V with experts or without, pictures only."""

    family = "glm46v"
    model_class = Glm46VForConditionalGeneration
    text_types = ("glm4v_text", "glm4v_moe_text")


class GlmOcrTarget(Glm4vTarget):
    """GLM-OCR, pictures only."""

    family = "glm_ocr"
    model_class = GlmOcrForConditionalGeneration
    text_types = ("glm_ocr_text",)

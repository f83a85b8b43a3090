"""GLM-4.1V to 4.6V and GLM-OCR as target: M-RoPE positions as Qwen2-VL, and videos as pictures with timestamps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Glm4vForConditionalGeneration,
    Glm4vMoeForConditionalGeneration,
    Glm46VForConditionalGeneration,
    GlmOcrForConditionalGeneration,
)

from eagle.families.base import Media, PromptEmbeds
from eagle.families.qwen2_vl.target import KINDS, Qwen2VLTarget
from llava.errors import UserError


class Glm4vTarget(Qwen2VLTarget):
    """GLM-4.1V. A feature of a video has the same id as one of a picture, and lies between the ids around a video."""

    family = "glm4v"
    model_class = Glm4vForConditionalGeneration
    text_types: ClassVar[tuple[str, ...]] = ("glm4v_text",)
    media = (
        Media("image", "image_token_id", ("pixel_values", "image_grid_thw")),
        Media("video", "image_token_id", ("pixel_values_videos", "video_grid_thw")),
    )

    def token_types(self, input_ids: Tensor) -> Tensor:
        config = self.config
        begun, ended = (
            (input_ids == index).cumsum(dim=-1) for index in (config.video_start_token_id, config.video_end_token_id)
        )
        return (input_ids == config.image_token_id) * torch.where(begun > ended, KINDS["video"], KINDS["image"])

    def media_mask(self, media: Media, input_ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        return super().media_mask(media, input_ids, inputs) & (self.token_types(input_ids) == KINDS[media.name])

    def embed_prompt(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> PromptEmbeds:
        pictures, videos = (self.media_mask(media, input_ids, inputs).any(dim=1) for media in self.media)  # [B] each
        if bool((pictures & videos).any()):
            raise UserError(
                f"pictures and videos in one prompt, which transformers does not accept from {self.family} models",
                fix="give one or the other",
            )
        return super().embed_prompt(input_ids, inputs)


class Glm4vMoeTarget(Glm4vTarget):
    """GLM-4.5V."""

    family = "glm4v_moe"
    model_class = Glm4vMoeForConditionalGeneration
    text_types = ("glm4v_moe_text",)


class Glm46VTarget(Glm4vTarget):
    """GLM-4.6V with experts or without."""

    family = "glm46v"
    model_class = Glm46VForConditionalGeneration
    text_types = ("glm4v_text", "glm4v_moe_text")


class GlmOcrTarget(Glm4vTarget):
    """GLM-OCR."""

    family = "glm_ocr"
    model_class = GlmOcrForConditionalGeneration
    text_types = ("glm_ocr_text",)

"""Qwen2-VL and Qwen2.5-VL as target: M-RoPE positions [3, B, S], image tokens by the picture's size, videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from eagle.families.base import Media
from eagle.families.stock import StockTarget
from llava.errors import UserError

TEXT = 0
KINDS = {"image": 1, "video": 2}
"""transformers' mm_token_type_ids."""
GRIDS = ("image_grid_thw", "video_grid_thw")


class Qwen2VLTarget(StockTarget):
    """Qwen2-VL of any size, embeddings tied or not."""

    family = "qwen2_vl"
    model_class = Qwen2VLForConditionalGeneration
    text_types: ClassVar[tuple[str, ...]] = ("qwen2_vl_text",)
    media: ClassVar[tuple[Media, ...]] = (
        Media("image", "image_token_id", ("pixel_values", "image_grid_thw")),
        Media("video", "video_token_id", ("pixel_values_videos", "video_grid_thw")),
    )

    def token_types(self, input_ids: Tensor) -> Tensor:
        """[B, S]: 0 text, 1 image, 2 video."""
        types = [(input_ids == getattr(self.config, media.token)) * KINDS[media.name] for media in self.media]
        return torch.stack(types).sum(dim=0)

    def complete_inputs(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Token types, without which transformers 5 gives pictures and videos the positions of text."""
        if inputs.get("mm_token_type_ids") is not None or all(inputs.get(name) is None for name in GRIDS):
            return {}
        return {"mm_token_type_ids": self.token_types(input_ids)}

    def prompt_positions(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        attention_mask = inputs.get("attention_mask")
        types = self.token_types(input_ids)
        grids = {name: inputs.get(name) for name in GRIDS}
        if not types.any():
            seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            positions = (seen.cumsum(dim=-1) - 1).clamp(min=0).expand(3, -1, -1)  # [3, B, S]
        elif any(grid is not None for grid in grids.values()):
            rest = {"second_per_grid_ts": inputs.get("second_per_grid_ts"), "attention_mask": attention_mask}
            positions, _ = self.model.model.get_rope_index(input_ids, mm_token_type_ids=types, **grids, **rest)
        else:  # transformers' `generate` has encoded the pictures and computed their positions already
            positions = inputs["position_ids"][-3:]
            self._refuse_text_positions(types, positions)
        if attention_mask is not None:
            positions = positions.masked_fill(attention_mask == 0, 0)
        following = positions.amax(dim=(0, 2)) + 1
        if (positions[..., -1] + 1 != following).any():  # transformers goes on from the three numbers of the last token
            raise UserError("a prompt ends with a picture or video", fix="write some text behind it")
        return positions, following

    @staticmethod
    def _refuse_text_positions(types: Tensor, positions: Tensor) -> None:
        """Raises `UserError` if pictures or videos have the positions of text: the same number in all three rows.

        Of two neighbouring media tokens at least one has different numbers in its rows.
        """
        media = types != TEXT  # [B, S]
        several = (media[:, 1:] & media[:, :-1]).any(dim=1)  # [B]
        alike = (positions == positions[:1]).all(dim=0)  # [B, S]
        if (several & (alike | ~media).all(dim=1)).any():
            raise UserError(
                "transformers has numbered the tokens of a picture or video as text",
                fix="give generate the processor's mm_token_type_ids, or call MSDModel.generate",
            )

    def text_positions(self, positions: Tensor) -> Tensor:
        return positions.expand(3, -1, -1)


class Qwen2_5VLTarget(Qwen2VLTarget):
    """Qwen2.5-VL: another vision tower and seconds on the time axis of videos, all else as Qwen2-VL."""

    family = "qwen2_5_vl"
    model_class = Qwen2_5_VLForConditionalGeneration
    text_types = ("qwen2_5_vl_text",)

"""Qwen2-VL's and Qwen2.5-VL's training template: the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle.families.stock import parts_of, write_chat
from eagle.families.template import Template


class QwenTemplate(Template):
    """``<|im_start|>user\\n<question><|im_end|>\\n<|im_start|>assistant\\n<answer><|im_end|>\\n``."""

    image_inputs = ("pixel_values", "image_grid_thw")

    def write(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        return write_chat(self.processor, [(parts_of(question), answer) for question, answer in turns], system)

    def grids(self, images: dict[str, Tensor]) -> Tensor:
        if "image_grid_thw" not in images:
            return super().grids(images)
        merge = self.processor.image_processor.merge_size
        return images["image_grid_thw"] // torch.tensor([1, merge, merge])

    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        grids = images["image_grid_thw"][:count]  # [count, 3] frames, rows and columns of patches
        return {"pixel_values": images["pixel_values"][: int(grids.prod(dim=-1).sum())], "image_grid_thw": grids}

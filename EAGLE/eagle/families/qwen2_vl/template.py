"""Qwen2-VL's and Qwen2.5-VL's training template: the checkpoint's own chat template."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle.families.template import Template


class QwenTemplate(Template):
    """``<|im_start|>user\\n<question><|im_end|>\\n<|im_start|>assistant\\n<answer><|im_end|>\\n``."""

    image_inputs = ("pixel_values", "image_grid_thw")

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

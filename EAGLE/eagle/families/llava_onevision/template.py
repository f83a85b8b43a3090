"""LLaVA-OneVision's training template: the checkpoint's own chat template."""

from __future__ import annotations

from eagle.families.template import PicturesFirstTemplate


class LlavaOnevisionTemplate(PicturesFirstTemplate):
    """``<|im_start|>user <question><|im_end|><|im_start|>assistant\\n<answer><|im_end|>``. A picture has several tiles
    if it is the only one."""

    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")

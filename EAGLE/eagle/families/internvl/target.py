"""InternVL as target, in the layout of transformers (``OpenGVLab/*-hf``): a picture is cut into tiles of one size."""

from __future__ import annotations

from transformers import InternVLForConditionalGeneration

from eagle.families.stock import StockTarget


class InternVLTarget(StockTarget):
    """InternVL 2.5, 3 and 3.5 with any language model whose layers can be verified."""

    family = "internvl"
    model_class = InternVLForConditionalGeneration

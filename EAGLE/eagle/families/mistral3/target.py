"""Mistral 3 as target (Mistral Small 3.1, Ministral 3, Pixtral's vision tower): a picture has a token for each row."""

from __future__ import annotations

from transformers import Mistral3ForConditionalGeneration

from eagle.families.base import Media
from eagle.families.stock import StockTarget


class Mistral3Target(StockTarget):
    """Mistral 3 with any language model whose layers can be verified."""

    family = "mistral3"
    model_class = Mistral3ForConditionalGeneration
    media = (Media("image", "image_token_id", ("pixel_values", "image_sizes")),)

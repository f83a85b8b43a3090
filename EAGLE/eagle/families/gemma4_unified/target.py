"""Gemma 4 that reads patches of pictures directly, without an encoder."""

from __future__ import annotations

from transformers import Gemma4UnifiedForConditionalGeneration

from eagle.families.gemma4.target import Gemma4Target


class Gemma4UnifiedTarget(Gemma4Target):
    """Gemma 4 12B."""

    family = "gemma4_unified"
    model_class = Gemma4UnifiedForConditionalGeneration
    text_types = ("gemma4_unified_text",)

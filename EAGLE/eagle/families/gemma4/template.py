"""Gemma 4's training template: the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from eagle.families.template import Template

MODEL_TURN = "<|turn>model\n"
NO_THOUGHT = "<|channel>thought\n<channel|>"


class Gemma4Template(Template):
    """``<|turn>user\\n<question><turn|>\\n<|turn>model\\n<answer><turn|>\\n``.

    Templates of the larger models write an empty thought before an answer that is to be generated, but not before a
    given one. Here it is before each answer, since an answer must follow what it follows at inference.
    """

    image_inputs = ("pixel_values", "image_position_ids")

    @cached_property
    def begin(self) -> str:
        """What the checkpoint's template writes before an answer that is to be generated."""
        asked = super().write([("", None)], None)
        return MODEL_TURN + NO_THOUGHT if asked.endswith(NO_THOUGHT) else MODEL_TURN

    def write(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        text = super().write(turns, system)
        return text.replace(self.begin, MODEL_TURN).replace(MODEL_TURN, self.begin)

    @property
    def written_mark(self) -> str:
        tokenizer = self.processor.tokenizer
        return f"{tokenizer.boi_token}{tokenizer.image_token}{tokenizer.eoi_token}"

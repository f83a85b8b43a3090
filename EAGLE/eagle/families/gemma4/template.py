"""Gemma 4's training template: the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eagle.families.template import Template

NO_THOUGHT = "<|channel>thought\n<channel|>"


class Gemma4Template(Template):
    """``<|turn>user\\n<question><turn|>\\n<|turn>model\\n<answer><turn|>\\n``. Templates of the larger models write an
    empty thought before an answer that is to be generated, but not before a given one."""

    image_inputs = ("pixel_values", "image_position_ids")

    def write(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        return super().write(turns, system).removesuffix(NO_THOUGHT)

    @property
    def written_mark(self) -> str:
        tokenizer = self.processor.tokenizer
        return f"{tokenizer.boi_token}{tokenizer.image_token}{tokenizer.eoi_token}"

    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        return {name: images[name][:count] for name in self.image_inputs} if count else {}

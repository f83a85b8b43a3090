"""Gemma 3's training template: the checkpoint's own chat template."""

from __future__ import annotations

from eagle.families.template import Template


class Gemma3Template(Template):
    """``<start_of_turn>user\\n<question><end_of_turn>\\n<start_of_turn>model\\n<answer><end_of_turn>\\n``."""

    @property
    def least_picture_tokens(self) -> int:
        return self.processor.image_seq_length

    @property
    def image_mark(self) -> str:
        return self.processor.boi_token

    @property
    def written_mark(self) -> str:
        tokenizer = self.processor.tokenizer
        return f"\n\n{tokenizer.boi_token}{tokenizer.image_token}{tokenizer.eoi_token}\n\n"

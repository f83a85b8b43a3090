"""Mistral 3's training template: the checkpoint's own chat template."""

from __future__ import annotations

from eagle.families.template import Template


class Mistral3Template(Template):
    """``<s>[INST]<question>[/INST]<answer></s>``."""

    image_inputs = ("pixel_values", "image_sizes")

    @property
    def written_mark(self) -> str:
        return self.processor.image_token + self.processor.image_end_token

    @property
    def inner_ids(self) -> frozenset[int]:
        """A token ends each row of a picture."""
        return frozenset([self.processor.image_break_token_id])

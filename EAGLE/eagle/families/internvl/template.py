"""InternVL's training template: the checkpoint's own chat template."""

from __future__ import annotations

from eagle.families.template import PicturesFirstTemplate


class InternVLTemplate(PicturesFirstTemplate):
    """``<|im_start|>user\\n<question><|im_end|>\\n<|im_start|>assistant\\n<answer><|im_end|>\\n``. A picture has
    several tiles, and its inputs do not tell how many."""

    @property
    def least_picture_tokens(self) -> int:
        return self.processor.image_seq_length

    @property
    def written_mark(self) -> str:
        processor = self.processor
        return f"{processor.start_image_token}{processor.image_token}{processor.end_image_token}"

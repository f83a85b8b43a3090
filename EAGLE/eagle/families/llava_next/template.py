"""LLaVA-1.6's training template: the text of LLaVA-1.5, pictures through transformers' processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eagle.families.llava.template import write_vicuna
from eagle.families.stock import text_part, write_chat
from eagle.families.template import Template
from llava.errors import UserError


class LlavaNextTemplate(Template):
    """``<system> USER: <question> ASSISTANT: <answer></s>USER: ...``.

    Raises:
        UserError: the checkpoint's chat template is not Vicuna's, as with the Mistral and Yi language models.
    """

    image_inputs = ("pixel_values", "image_sizes")

    def __init__(self, processor: Any, image_token_id: int, video_token_id: int | None = None) -> None:
        super().__init__(processor, image_token_id, video_token_id)
        if processor.chat_template:
            prompt = write_chat(processor, [([text_part("What?")], None)])
            if not prompt.endswith("ASSISTANT:"):
                raise UserError(
                    "training data can be written only for LLaVA-1.6 models with a Vicuna language model",
                    where=f"chat template that writes {prompt!r}",
                    fix="use a Vicuna checkpoint such as llava-hf/llava-v1.6-vicuna-7b-hf",
                )

    def write(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        return write_vicuna(turns, system)

    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        return {name: images[name][:count] for name in self.image_inputs} if count else {}

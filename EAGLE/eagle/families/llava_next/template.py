"""LLaVA-1.6's training template: the checkpoint's own chat template, pictures through transformers' processor."""

from __future__ import annotations

from collections.abc import Sequence

from eagle.families.stock import parts_of, write_chat
from eagle.families.template import Template
from llava.conversation import write_turns


class LlavaNextTemplate(Template):
    """``<system> USER: <question> ASSISTANT: <answer></s>`` for a processor without a chat template."""

    image_inputs = ("pixel_values", "image_sizes")

    def write(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        if self.processor.chat_template:
            return write_chat(self.processor, [(parts_of(question), answer) for question, answer in turns], system)
        return write_turns(turns, system)

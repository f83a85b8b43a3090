"""Qwen2-VL's and Qwen2.5-VL's conversation template: the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eagle.conversations import MARK, Conversation, Unusable
from eagle.families.stock import load_processor
from eagle.families.template import Encoded, Segment, Template, mark_first

Message = dict[str, Any]


class QwenTemplate(Template):
    """``<|im_start|>user\\n<question><|im_end|>\\n<|im_start|>assistant\\n<answer><|im_end|>\\n``."""

    family = "qwen2_vl"

    @staticmethod
    def load_processor(model: str) -> Any:
        return load_processor(model)

    def segments(self, conversation: Conversation) -> list[Segment]:
        system = conversation.system
        messages = [] if system is None else [said("system", [{"type": "text", "text": system}])]
        segments, before = [], ""
        for question, answer in conversation.turns:
            messages.append(said("user", parts_of(mark_first(question))))
            asked = self._write(messages, open_answer=True)
            messages.append(said("assistant", [{"type": "text", "text": answer}]))
            answered = self._write(messages)
            if not (asked.startswith(before) and answered.startswith(asked)):
                raise Unusable("template")
            spoken = answered[len(asked) :].rstrip("\n")  # the line's end belongs to nobody
            segments += [Segment(asked[len(before) :], False), Segment(spoken, True)]
            before = asked + spoken
        return segments

    def _write(self, messages: list[Message], open_answer: bool = False) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=open_answer, tokenize=False)

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> Encoded:
        written = self.processor.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        written_ids = written["input_ids"]
        videos = self.media_ids - {self.image_token_id}
        if written_ids.count(self.image_token_id) != len(pictures) or not videos.isdisjoint(written_ids):
            raise Unusable("text")  # the text itself spells the token of a picture or video
        if not pictures:
            return Encoded(written_ids, [tuple(span) for span in written["offset_mapping"]], {})
        try:
            given = self.processor(text=[prompt], images=list(pictures), return_tensors="pt")
        except ValueError:  # such as a picture 200 times as wide as high
            raise Unusable("broken_picture") from None
        merged = self.processor.image_processor.merge_size**2
        counts = iter((given["image_grid_thw"].prod(dim=-1) // merged).tolist())
        ids, spans = [], []
        for token, span in zip(written_ids, written["offset_mapping"], strict=True):
            repeat = next(counts, 0) if token == self.image_token_id else 1
            ids += [token] * repeat
            spans += [tuple(span)] * repeat
        if ids != given["input_ids"][0].tolist():  # the processor wrote something else
            raise Unusable("text")
        return Encoded(ids, spans, {name: given[name] for name in ("pixel_values", "image_grid_thw")})

    def grids(self, images: dict[str, Tensor]) -> Tensor:
        if "image_grid_thw" not in images:
            return super().grids(images)
        merge = self.processor.image_processor.merge_size
        return images["image_grid_thw"] // torch.tensor([1, merge, merge])

    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        grids = images["image_grid_thw"][:count]  # [count, 3] frames, rows and columns of patches
        return {"pixel_values": images["pixel_values"][: int(grids.prod(dim=-1).sum())], "image_grid_thw": grids}


class Qwen2_5Template(QwenTemplate):
    """As Qwen2-VL."""

    family = "qwen2_5_vl"


def said(role: str, content: list[Message]) -> Message:
    """One message of transformers' chat templates."""
    return {"role": role, "content": content}


def parts_of(text: str) -> list[Message]:
    """A question's words and pictures, in order.

    >>> parts_of("<image>\\nWhat?")
    [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    """
    parts: list[Message] = []
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts

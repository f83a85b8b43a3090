"""Qwen2-VL and Qwen2.5-VL, written as lmms-eval's `qwen2_vl` and `qwen2_5_vl` write them, with their picture sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from eagle.families import Target
from llava.errors import UserError
from lmms_eval_msd.conversation import IMAGE_MARK, Conversation, Prompt
from lmms_eval_msd.video import provide_reader, thin_out
from lmms_eval_msd.visuals import Visual

PLACE = re.compile(r"<image (\d+)>")


class QwenConversation(Conversation):
    """A system turn, then one turn with pictures and videos first and the text after them.

    Args:
        target: the base model. Its processor has to know the limits of ``pixels``.
        system: text of the system turn.
        pixels: fewest and most pixels of a picture or of a video's frame.
        frames: most frames of a video.
        interleave: put pictures where the text says `<image 1>`, `<image 2>`, ...
        reasoning: text after every question.
    """

    def __init__(
        self,
        target: Target,
        system: str,
        pixels: tuple[int, int],
        frames: int = 32,
        interleave: bool = False,
        reasoning: str | None = None,
    ) -> None:
        self.target, self.system, self.pixels, self.frames = target, system, pixels, frames
        self.interleave = interleave
        self.reasoning = reasoning.replace("\\n", "\n") if reasoning else None

    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        text = context.replace(IMAGE_MARK, "")
        if self.reasoning:
            text = text.strip() + self.reasoning
        parts: list[Visual | Text] = [*visuals, Text(text)]
        if self.interleave:
            parts = interleaved(text, visuals)
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": [_described(part) for part in parts]},
        ]
        written = self.target.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return Prompt(written, tuple(part for part in parts if not isinstance(part, Text)))

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        pictures, videos = self._load([visual for prompt in prompts for visual in prompt.visuals])
        batch = self.target.processor(
            text=[prompt.text for prompt in prompts],
            images=pictures,
            videos=videos,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(batch.to(self.target.device))

    def _load(self, visuals: Sequence[Visual]) -> tuple[Any, Any]:
        """Pictures and videos in the sizes that Qwen models want; None for none.

        Pictures pass through JPEG, because they do in lmms-eval's own models: else scores would not compare.
        """
        from lmms_eval.models.model_utils.media_encoder import encode_image_to_data_url
        from qwen_vl_utils import process_vision_info

        if not visuals:
            return None, None
        fewest, most = self.pixels
        elements: list[dict[str, Any]] = []
        for visual in visuals:
            element: dict[str, Any] = {"max_pixels": most, "min_pixels": fewest}
            if isinstance(visual, Image.Image):
                settings = {"image_format": "JPEG", "mime_type": "image/jpeg", "convert_rgb": True, "quality": 85}
                element |= {"type": "image", "image": encode_image_to_data_url(visual, **settings)}
            else:
                provide_reader()
                element |= {"type": "video", "video": visual}
            elements.append(element)
        try:
            pictures, videos = process_vision_info([{"role": "user", "content": elements}])
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            names = ", ".join(str(visual) for visual in visuals if isinstance(visual, str))
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError("picture or video cannot be read", names or None, first_line) from error
        return pictures, None if videos is None else [thin_out(video, self.frames) for video in videos]


@dataclass(frozen=True)
class Text:
    """A part of a turn that is text; the others are visuals."""

    text: str


def interleaved(text: str, visuals: Sequence[Visual]) -> list[Visual | Text]:
    """Text and visuals in the order of the text's `<image N>` places; without places the visuals come first.

    >>> interleaved("see <image 2>.", ["a.mp4", "b.mp4"])
    [Text(text='see '), 'b.mp4', Text(text='.')]
    """
    if not PLACE.search(text):
        return [*visuals, Text(text)]
    pieces = PLACE.split(text)  # text, number, text, number, text
    parts: list[Visual | Text] = []
    for position, piece in enumerate(pieces):
        if position % 2 == 0:
            if piece:
                parts.append(Text(piece))
        elif 1 <= int(piece) <= len(visuals):
            parts.append(visuals[int(piece) - 1])
    return parts


def _described(part: Visual | Text) -> dict[str, str]:
    """A part as a chat template reads it."""
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image"} if isinstance(part, Image.Image) else {"type": "video"}

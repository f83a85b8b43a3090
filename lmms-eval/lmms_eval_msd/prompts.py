"""Prompts and model inputs, written as lmms-eval's own models write them, so that scores compare.

LLaVA's are those of `llava_hf`, Qwen's those of `qwen2_vl` and `qwen2_5_vl` with their picture sizes. They differ from
`Target.chat_prompt` in the places of the pictures, in the choice of a template, and in reading videos.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from eagle.families import Target
from eagle.families.stock import processor_errors, text_part, write_chat
from llava.conversation import build_prompt
from llava.errors import UserError
from llava.image import load_image
from lmms_eval_msd.video import provide_reader, thin_out

IMAGE_MARK = "<image>"
NUMBERED_MARK = re.compile(r"<image (\d+)>")
VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
ASPECTS = ("pad", "crop")
PROCESSORS, TOKENIZERS = "processor", "tokenizer"
"""As `chat_template`: the checkpoint's own, as everywhere else; the tokenizer's, else Vicuna's, as in `llava_hf`."""

Visual = Image.Image | str
"""A picture, or the path of a video."""


@dataclass(frozen=True)
class Prompt:
    """``text``: the whole prompt; ``visuals``: its pictures and videos, in the order of their marks in the text."""

    text: str
    visuals: tuple[Visual, ...] = ()


class PromptWriter(ABC):
    """Writes prompts as the model of lmms-eval that a family's scores are compared with."""

    @abstractmethod
    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        """The conversation around one request.

        Args:
            context: few-shot examples and question, as the task wrote them.
            visuals: of the request.

        Raises:
            UserError: the family cannot read one of the ``visuals``.
        """

    @abstractmethod
    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Model inputs of prompts, padded on the left where there are several, on the model's device."""


class LlavaPrompts(PromptWriter):
    """LLaVA-1.5 and LLaVA-1.6: pictures are `<image>` marks in the text of one turn.

    Args:
        target: the base model.
        system: system prompt instead of the conversation's own.
        template: "processor", "tokenizer" or a chat template (Jinja). Default: the checkpoint's own, else as
            "tokenizer".
        aspect: LLaVA-1.5: "pad" makes pictures square with a border, "crop" cuts their middle out as `llava_hf` does;
            None leaves it to the checkpoint.
    """

    def __init__(
        self, target: Target, system: str | None = None, template: str | None = None, aspect: str | None = None
    ) -> None:
        has_own = bool(getattr(target.processor, "chat_template", None))
        self.target, self.system = target, system
        self.template = template or (PROCESSORS if has_own else TOKENIZERS)
        if template == PROCESSORS and not has_own:
            raise UserError("the processor of this base model has no chat template", fix="leave chat_template out")
        if aspect is not None:
            if aspect not in ASPECTS or not hasattr(target.processor, "aspect"):
                raise UserError(
                    "image_aspect cannot be used", aspect, f"it is one of {', '.join(ASPECTS)}, for llava_msd"
                )
            target.processor.aspect = aspect

    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        pictures = pictures_only(visuals, self.target.family)
        question = context
        if context.count(IMAGE_MARK) != len(pictures):
            question = context.replace(IMAGE_MARK, "")
            if pictures:
                question = " ".join([IMAGE_MARK] * len(pictures)) + "\n" + question
        return Prompt(self._conversation(question, len(pictures)), tuple(pictures))

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        texts = [prompt.text for prompt in prompts]
        pictures = [visual for prompt in prompts for visual in prompt.visuals]
        return self.target.prepare(texts if len(texts) > 1 else texts[0], pictures)

    def _conversation(self, question: str, num_images: int) -> str:
        """In the chosen template; for "tokenizer" the first that exists of the tokenizer's and LLaVA-1.5's own.

        A tokenizer's template that expects a list of parts would lose the question, and is skipped.
        """
        if self.template == PROCESSORS:  # it puts the marks before the text itself
            without_marks = question.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "").lstrip(" ")
            return self.target.chat_prompt(without_marks, num_images, system=self.system)
        chosen = None if self.template == TOKENIZERS else self.template
        template = chosen or getattr(self.target.tokenizer, "chat_template", None)
        if template:
            messages = [] if self.system is None else [{"role": "system", "content": self.system}]
            messages.append({"role": "user", "content": question})
            text = self.target.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            if question.strip() in text:
                return text
            if chosen:
                raise UserError("chat_template does not write the question", template[:60])
        return build_prompt(question, system=self.system)


class QwenPrompts(PromptWriter):
    """Qwen2-VL and Qwen2.5-VL: a system turn, then one turn with pictures and videos first and the text after them.

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
        parts: list[Visual | Text] = interleaved(text, visuals) if self.interleave else [*visuals, Text(text)]
        question = [_chat_part(part) for part in parts]
        written = write_chat(self.target.processor, [(question, None)], self.system)
        return Prompt(written, tuple(part for part in parts if not isinstance(part, Text)))

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        pictures, videos = self._load([visual for prompt in prompts for visual in prompt.visuals])
        with processor_errors():
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
        """Pictures and videos in the sizes that Qwen models expect; None for none.

        Pictures pass through JPEG as in lmms-eval's own models, or scores would not compare.
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
    """Text and visuals in the order of the text's `<image N>` marks; without such marks the visuals come first.

    >>> interleaved("see <image 2>.", ["a.mp4", "b.mp4"])
    [Text(text='see '), 'b.mp4', Text(text='.')]
    """
    if not NUMBERED_MARK.search(text):
        return [*visuals, Text(text)]
    pieces = NUMBERED_MARK.split(text)  # text, number, text, number, text
    parts: list[Visual | Text] = []
    for position, piece in enumerate(pieces):
        if position % 2 == 0:
            if piece:
                parts.append(Text(piece))
        elif 1 <= int(piece) <= len(visuals):
            parts.append(visuals[int(piece) - 1])
    return parts


def _chat_part(part: Visual | Text) -> dict[str, str]:
    if isinstance(part, Text):
        return text_part(part.text)
    return {"type": "image"} if isinstance(part, Image.Image) else {"type": "video"}


def visuals_of(given: Any) -> list[Visual]:
    """The pictures and videos that a task's `doc_to_visual` gave: none, one, a list, or a list of lists.

    Raises:
        UserError: it gave something else, such as sound, or a picture cannot be read.
    """
    if given is None:
        return []
    if isinstance(given, Image.Image):
        return [given]
    if isinstance(given, str):
        if given.lower().endswith(VIDEO_ENDINGS):
            return [given]
        if not given.lower().endswith(tuple(Image.registered_extensions())):
            raise UserError("the task gives a file that is neither picture nor video", given)
        return [load_image(given)]
    if isinstance(given, Iterable) and not isinstance(given, dict | bytes):
        return [visual for part in given for visual in visuals_of(part)]
    raise UserError(f"the task gives a {type(given).__name__}", fix="MSD evaluates tasks of pictures, videos and text")


def pictures_only(visuals: Iterable[Visual], family: str) -> list[Image.Image]:
    """``visuals`` of a family that reads only pictures.

    Raises:
        UserError: there is a video among them.
    """
    pictures = []
    for visual in visuals:
        if isinstance(visual, str):
            raise UserError(f"the task gives a video, and {family} models see pictures alone", visual)
        pictures.append(visual)
    return pictures

"""Prompts and model inputs, written as lmms-eval's own models write them, so that scores compare.

They differ from `Target.chat_prompt` in the places of the pictures, in the choice of a template, and in reading videos.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
from lmms_eval.models.model_utils.reasoning_model_utils import parse_reasoning_model_answer
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from eagle.families import Target
from eagle.families.stock import text_part, write_chat
from llava.conversation import build_prompt
from llava.errors import UserError, reason_of
from llava.image import load_image
from lmms_eval_msd.video import frames_at, measure, provide_reader, thin_out

FRAMES = 32
"""Most frames of a video, as in lmms-eval's own models."""
IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
NUMBERED_MARK = re.compile(r"<image (\d+)>")
VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
ASPECTS = ("pad", "crop")
SOFT_TOKENS = (70, 140, 280, 560, 1120)
PROCESSORS, TOKENIZERS = "processor", "tokenizer"
"""As `chat_template`: the checkpoint's own, as everywhere else; the tokenizer's, else Vicuna's, as in `llava_hf`."""
END_OF_THOUGHT = "</think>"

Visual = Image.Image | str
"""A picture, or the path of a video."""


@dataclass(frozen=True)
class Prompt:
    """``text``: the whole prompt; ``visuals``: its pictures and videos, in the order of their marks in the text."""

    text: str
    visuals: tuple[Visual, ...] = ()


@dataclass(eq=False)
class ChatPrompts:
    """The checkpoint's chat template: pictures and videos first and the text after them, in one turn.

    ``has_videos``: whether the family reads videos; ``jpeg``: whether pictures are converted to JPEG. Fields of
    subclasses are settings of `--model_args`.

    Args:
        target: the base model.
        system: text of the system turn; None leaves it to the template.
    """

    target: Target
    system: str | None = None
    has_videos: ClassVar[bool] = False
    jpeg: ClassVar[bool] = False

    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        """The conversation around one request.

        Args:
            context: few-shot examples and question, as the task wrote them.
            visuals: of the request.

        Raises:
            UserError: the family cannot read one of the ``visuals``.
        """
        self.check(visuals)
        parts = self.parts(context.replace(IMAGE_MARK, ""), visuals)
        question = [_chat_part(part) for part in parts]
        written = write_chat(self.target.processor, [(question, None)], self.system, **self.variables)
        return Prompt(written, tuple(part for part in parts if not isinstance(part, Text)))

    def check(self, visuals: Sequence[Visual]) -> None:
        """Raises `UserError` if there is a video and the family reads only pictures."""
        for visual in visuals:
            if isinstance(visual, str) and not self.has_videos:
                raise UserError(f"the task gives a video, and {self.target.family} models see pictures alone", visual)

    def parts(self, text: str, visuals: Sequence[Visual]) -> list[Visual | Text]:
        """What is in the turn, in order."""
        return [*visuals, Text(text)]

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the template."""
        return {}

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Model inputs of prompts, padded on the left where there are several, on the model's device."""
        visuals = [visual for prompt in prompts for visual in prompt.visuals]
        with visual_errors(visuals):
            pictures, settings = self.read(visuals)
        texts = [prompt.text for prompt in prompts]
        return self.target.prepare(texts if len(texts) > 1 else texts[0], pictures, **settings)

    def read(self, visuals: Sequence[Visual]) -> tuple[list[Image.Image], dict[str, Any]]:
        """The pictures among ``visuals``, and arguments of the processor with the videos."""
        pictures = [visual for visual in visuals if isinstance(visual, Image.Image)]
        if self.jpeg:
            pictures = [as_jpeg(picture) for picture in pictures]
        videos = [self.frames(visual) for visual in visuals if isinstance(visual, str)]
        if not videos:
            return pictures, {}
        frames, known = map(list, zip(*videos, strict=True))
        return pictures, {"videos": frames, "video_metadata": known, "do_sample_frames": False}

    def frames(self, path: str) -> tuple[Tensor, VideoMetadata]:
        """Frames [T, 3, h, w] of a video, and which they are."""
        count, rate = measure(path)
        known = VideoMetadata(count, rate, duration=count / rate, video_backend="pyav")
        known.frames_indices = [int(index) for index in self.choose_frames(known)]
        return frames_at(path, known.frames_indices), known

    def choose_frames(self, video: VideoMetadata) -> Iterable[int]:
        """Indices of the frames that are read, rising: by default as the checkpoint's own processor chooses them."""
        return self.target.processor.video_processor.sample_frames(video)

    def finish(self, answer: str) -> str:
        """What is scored of an answer."""
        return answer


@dataclass(eq=False)
class LlavaPrompts(ChatPrompts):
    """LLaVA as `llava_hf`: pictures are `<image>` marks in the text of one turn.

    Args:
        chat_template: "processor", "tokenizer" or a chat template (Jinja). Default: the checkpoint's own, else as
            "tokenizer".
    """

    chat_template: str | None = None

    def __post_init__(self) -> None:
        has_own = bool(getattr(self.target.processor, "chat_template", None))
        if self.chat_template == PROCESSORS and not has_own:
            raise UserError("the processor of this base model has no chat template", fix="leave chat_template out")
        self.chat_template = self.chat_template or (PROCESSORS if has_own else TOKENIZERS)

    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        if self.chat_template == PROCESSORS:  # it puts the marks before the text itself
            return super().write(context.replace(f"{IMAGE_MARK}\n", "").lstrip(" "), visuals)
        self.check(visuals)
        question, marks = context, [VIDEO_MARK if isinstance(visual, str) else IMAGE_MARK for visual in visuals]
        known = (IMAGE_MARK, VIDEO_MARK) if self.has_videos else (IMAGE_MARK,)
        if any(context.count(mark) != marks.count(mark) for mark in known):
            for mark in known:
                question = question.replace(mark, "")
            if marks:
                question = " ".join(marks) + "\n" + question
        return Prompt(self._conversation(question), tuple(visuals))

    def _conversation(self, question: str) -> str:
        """In the chosen template; for "tokenizer" the first that exists of the tokenizer's and LLaVA-1.5's own.

        A tokenizer's template that expects a list of parts would lose the question, and is skipped.
        """
        chosen = None if self.chat_template == TOKENIZERS else self.chat_template
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


@dataclass(eq=False)
class Llava15Prompts(LlavaPrompts):
    """LLaVA-1.5.

    Args:
        image_aspect: "pad" makes pictures square with a border, "crop" cuts their middle out as `llava_hf` does; None
            leaves it to the checkpoint.
    """

    image_aspect: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_aspect is not None:
            if self.image_aspect not in ASPECTS:
                raise UserError(f"image_aspect is none of {', '.join(ASPECTS)}", self.image_aspect)
            self.target.processor.aspect = self.image_aspect

    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        if self.chat_template != PROCESSORS:
            return super().write(context, visuals)
        self.check(visuals)  # its processor has a template, but is not one of transformers
        text = context.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "").lstrip(" ")
        return Prompt(self.target.chat_prompt(text, len(visuals), system=self.system), tuple(visuals))


@dataclass(eq=False)
class OnevisionPrompts(LlavaPrompts):
    """LLaVA-OneVision as `llava_hf`.

    Args:
        max_num_frames: frames of each video, from its first to its last; a shorter video repeats frames.
    """

    max_num_frames: int = FRAMES
    has_videos = True

    def choose_frames(self, video: VideoMetadata) -> Iterable[int]:
        return np.linspace(0, video.total_num_frames - 1, self.max_num_frames, dtype=int)


@dataclass(eq=False)
class InternVLPrompts(ChatPrompts):
    """InternVL as `internvl_hf`.

    Args:
        max_patches: most tiles of a picture.
        max_num_frames: frames of each video, from the middle of equal parts; a shorter video repeats frames.
    """

    max_patches: int = 12
    max_num_frames: int = FRAMES
    has_videos = True

    def __post_init__(self) -> None:
        self.target.processor.image_processor.max_patches = self.max_patches

    def choose_frames(self, video: VideoMetadata) -> Iterable[int]:
        middles = (np.arange(self.max_num_frames) + 0.5) * video.total_num_frames / self.max_num_frames
        return middles.astype(int)


@dataclass(eq=False)
class InterleavedPrompts(ChatPrompts):
    """Prompts with settings of lmms-eval's models of Qwen and Gemma.

    Args:
        interleave_visuals: put pictures where the text says `<image 1>`, `<image 2>`, ...
        reasoning_prompt: text after every question.
    """

    interleave_visuals: bool = False
    reasoning_prompt: str | None = None

    def parts(self, text: str, visuals: Sequence[Visual]) -> list[Visual | Text]:
        if self.reasoning_prompt:
            text = text.strip() + self.reasoning_prompt.replace("\\n", "\n")
        return interleaved(text, visuals) if self.interleave_visuals else super().parts(text, visuals)


@dataclass(eq=False)
class Gemma3Prompts(InterleavedPrompts):
    """Gemma 3 as `gemma3`: pictures are converted to JPEG, and `<image 1>` is removed if pictures do not go there."""

    jpeg = True

    def parts(self, text: str, visuals: Sequence[Visual]) -> list[Visual | Text]:
        return super().parts(text if self.interleave_visuals else NUMBERED_MARK.sub("", text), visuals)


@dataclass(eq=False)
class Gemma4Prompts(Gemma3Prompts):
    """Gemma 4 as `gemma4`.

    Args:
        max_soft_tokens: most tokens of a picture and of a video's frame: 70, 140, 280, 560 or 1120.
        max_num_frames: most frames of a video, from its first to its last.
    """

    max_soft_tokens: int = 280
    max_num_frames: int = FRAMES
    has_videos = True

    def __post_init__(self) -> None:
        if self.max_soft_tokens not in SOFT_TOKENS:
            raise UserError(f"max_soft_tokens is none of {', '.join(map(str, SOFT_TOKENS))}", str(self.max_soft_tokens))
        for processor in (self.target.processor.image_processor, self.target.processor.video_processor):
            processor.max_soft_tokens = self.max_soft_tokens

    def choose_frames(self, video: VideoMetadata) -> Iterable[int]:
        count = min(self.max_num_frames, video.total_num_frames)
        return np.linspace(0, video.total_num_frames - 1, count, dtype=int)


@dataclass(eq=False)
class VideoPrompts(ChatPrompts):
    """The checkpoint's chat template and its choice of the frames of a video."""

    has_videos = True


@dataclass(eq=False)
class Glm4vPrompts(VideoPrompts):
    """GLM-4.1V to 4.6V as `glm4v`: pictures are converted to JPEG."""

    jpeg = True


@dataclass(eq=False)
class Mistral3Prompts(ChatPrompts):
    """Mistral 3 as `mistral3_vl`: several pictures are numbered. The checkpoint's template writes questions without
    pictures, and all questions if there is a system prompt, which `mistral3_vl` ignores."""

    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        if self.system is not None or not visuals:
            return super().write(context, visuals)
        self.check(visuals)
        mark = self.target.processor.image_token
        marks = [f"Image {number}: {mark}\n" for number in range(1, len(visuals) + 1)]
        pictures = "".join(marks) if len(marks) > 1 else mark
        return Prompt(f"<s>[INST]{pictures}\n{context}[/INST]", tuple(visuals))

    def finish(self, answer: str) -> str:
        """Without a thought; of `<answer>...</answer>` and a LaTeX box what is in it."""
        return parse_reasoning_model_answer(answer).rpartition(END_OF_THOUGHT)[2].strip()


@dataclass(eq=False)
class Qwen2Prompts(InterleavedPrompts):
    """Qwen2-VL as `qwen2_vl`: sizes and frames are those of `qwen_vl_utils`, and pictures are converted to JPEG.

    Args:
        min_pixels: fewest pixels of a picture or of a video's frame.
        max_pixels: most pixels.
        max_num_frames: most frames of a video.
    """

    min_pixels: int = 3136
    max_pixels: int = 602112
    max_num_frames: int = FRAMES
    has_videos = True
    jpeg = True

    def __post_init__(self) -> None:
        self.system = self.system or ""  # an empty turn, or the template writes its own
        if self.min_pixels > self.max_pixels:
            raise UserError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")

    def read(self, visuals: Sequence[Visual]) -> tuple[list[Image.Image], dict[str, Any]]:
        from qwen_vl_utils import process_vision_info

        if not visuals:
            return [], {}
        provide_reader()
        pictures, videos = process_vision_info(
            [{"role": "user", "content": [self._element(visual) for visual in visuals]}],
            image_patch_size=self.target.processor.image_processor.patch_size,
            return_video_metadata=True,
        )
        return pictures or [], {"do_resize": False, **(self.videos(videos) if videos else {})}

    def _element(self, visual: Visual) -> dict[str, Any]:
        if isinstance(visual, str):
            return {"type": "video", "video": visual, **self.frame_settings(visual)}
        return {"type": "image", "image": as_jpeg(visual) if self.jpeg else visual, **self.sizes}

    @property
    def sizes(self) -> dict[str, int]:
        return {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}

    def frame_settings(self, path: str) -> dict[str, Any]:
        """Which frames of a video `qwen_vl_utils` takes, two a second unless told otherwise, and their sizes."""
        return self.sizes

    def videos(self, read: Sequence[tuple[Tensor, dict[str, Any]]]) -> dict[str, Any]:
        """Arguments of the processor for frames [T, 3, h, w] of videos and what is known of each."""
        return {"videos": [thin_out(frames, self.max_num_frames) for frames, _ in read]}


@dataclass(eq=False)
class Qwen2_5Prompts(Qwen2Prompts):
    """Qwen2.5-VL as `qwen2_5_vl`."""

    min_pixels: int = 256 * 28 * 28
    max_pixels: int = 1605632


@dataclass(eq=False)
class Qwen3Prompts(Qwen2_5Prompts):
    """Qwen3-VL as `qwen3_vl`: pictures are not converted, and the frames of a video have timestamps.

    Args:
        enable_thinking: the template's switch. If it is true, only what follows the thought is scored.
    """

    enable_thinking: bool | None = None
    jpeg = False

    @property
    def variables(self) -> dict[str, Any]:
        return {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}

    def frame_settings(self, path: str) -> dict[str, Any]:
        count = measure(path)[0]
        return {"nframes": min(self.max_num_frames, count - count % 2), **self.sizes}  # an even number

    def videos(self, read: Sequence[tuple[Tensor, dict[str, Any]]]) -> dict[str, Any]:
        frames, known = map(list, zip(*read, strict=True))
        return {"videos": frames, "video_metadata": known, "do_sample_frames": False}

    def finish(self, answer: str) -> str:
        return answer.partition(END_OF_THOUGHT)[2].strip() if self.enable_thinking else answer


@dataclass(eq=False)
class Qwen3_5Prompts(Qwen3Prompts):
    """Qwen3.5 as `qwen3_5`: two frames of a video a second.

    Args:
        total_pixels: most pixels of all frames of a video, in place of those of each.
    """

    min_pixels: int = 64 * 32 * 32
    max_pixels: int = 128 * 32 * 32
    max_num_frames: int = 768
    enable_thinking: bool | None = True
    total_pixels: int = 224 * 1024 * 32 * 32

    def frame_settings(self, path: str) -> dict[str, Any]:
        return {"min_pixels": self.min_pixels, "total_pixels": self.total_pixels, "max_frames": self.max_num_frames}


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


def as_jpeg(picture: Image.Image) -> Image.Image:
    """The picture as lmms-eval's own models of Qwen2-VL and Gemma 3 see it, or scores would not compare."""
    encoded = BytesIO()
    picture.convert("RGB").save(encoded, "JPEG", quality=85)
    return Image.open(encoded)


@contextmanager
def visual_errors(visuals: Sequence[Visual]) -> Iterator[None]:
    """Raises `UserError` where a picture or video cannot be read, such as one without frames."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        names = ", ".join(visual for visual in visuals if isinstance(visual, str))
        raise UserError("picture or video cannot be read", names or None, reason_of(error)) from error

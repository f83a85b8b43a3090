"""Families whose checkpoints transformers reads without changes: loading, model inputs and chat templates."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from eagle.conversations import MARK
from eagle.families.base import Target
from llava.checkpoint import check_quantisation, quiet_transformers
from llava.device import dtype_for
from llava.errors import UserError, reason_of
from llava.generation import check_generation_config, check_special_tokens
from llava.hub import HUB_KEYS, Source
from llava.image import load_image
from llava.inputs import check_text
from llava.loading import load_errors
from llava.messages import check_written
from llava.processor import flat_pictures
from llava.processor_config import check_processor_files
from llava.weights import check_size, check_unquantised, find_weights, read_shapes

Part = dict[str, Any]
"""A part of a message, as transformers' chat templates read it."""
IMAGE: Part = {"type": "image"}
INVISIBLE = "\u2060"
SHOWN = 5
"""Names of tensors in a message."""
log = logging.getLogger(__name__)


class StockTarget(Target):
    """A target with transformers' own model class, processor and chat template."""

    model_class: ClassVar[type[PreTrainedModel]]

    @classmethod
    def load(cls, path: str, **kwargs: Any) -> Target:
        settings = {"attn_implementation": "sdpa", **{key: value for key, value in kwargs.items() if value is not None}}
        settings["dtype"] = dtype_for(settings.get("dtype", "auto"), settings.get("device_map"))
        hub = {key: settings[key] for key in HUB_KEYS if key in settings}
        processor = load_processor(path, **hub)
        source = Source.of(path, hub, "base model")
        config = load_config(path, **hub)
        check_quantisation(config, path)
        check_special_tokens(source, config.get_text_config().vocab_size)
        weights = find_weights(source)
        check_size(cls.model_class, config, read_shapes(weights), path)
        check_unquantised(config, weights)
        with quiet_transformers():
            check_generation_config(source, config.get_text_config().vocab_size)
            model, info = cls.model_class.from_pretrained(
                path, **settings, output_loading_info=True, ignore_mismatched_sizes=True
            )
        check_complete(info, path)
        return cls(model, processor)

    def prepare(self, prompt: str | Sequence[str], images: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
        """As in `Target`. ``more``: further arguments of the processor, such as videos."""
        if more.get("videos") and getattr(self.processor, "video_processor", None) is None:
            raise UserError(f"{self.family} models do not read videos", fix="give pictures")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for text in prompts:
            check_text(text, "prompt")
        pictures = [load_image(image) for image in flat_pictures(images)]
        marks = [text.count(self.image_mark) for text in prompts]
        if sum(marks) != len(pictures):
            raise UserError(f"prompt has {sum(marks)} image mark(s), but {len(pictures)} picture(s) were given")
        rest = iter(pictures)
        own = [list(islice(rest, count)) for count in marks]  # the pictures of each prompt
        settings = special_tokens(self.processor, prompts) | more
        if len(prompts) > 1:
            settings |= {"padding": True, "padding_side": "left"}
        with processor_errors():
            inputs = self.processor(text=prompts, images=own if pictures else None, return_tensors="pt", **settings)
        return {name: value for name, value in inputs.to(self.device).items() if isinstance(value, Tensor)}

    @property
    def image_mark(self) -> str:
        return self.processor.image_token

    def chat_prompt(
        self, question: str, num_images: int = 0, history: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> str:
        turns: list[tuple[list[Part], str | None]] = [
            ([text_part(asked)], without_marks(self.processor, answer)) for asked, answer in history
        ]
        turns.append(([text_part(question)], None))
        turns[0][0][:0] = [IMAGE] * num_images
        return write_chat(self.processor, turns, None if system is None else without_marks(self.processor, system))


def check_complete(info: Mapping[str, Any], path: str) -> None:
    """Refuses a checkpoint without some tensors of the model, which transformers fills with random values.

    Args:
        info: transformers' ``output_loading_info``.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    wrong = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if wrong:
        names = ", ".join(wrong[:SHOWN]) + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
        raise UserError(f"base model has {len(wrong)} missing or misshapen tensors: {names}", path, "download it again")
    if info["unexpected_keys"]:
        unknown = sorted(info["unexpected_keys"])
        log.warning(
            "%s: %d tensors are not part of the model and were left out: %s", path, len(unknown), unknown[:SHOWN]
        )


def special_tokens(processor: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of the processor. A begin-of-sequence token that the template has written is not added again,
    as in transformers' ``apply_chat_template``."""
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin and all(text.startswith(begin) for text in prompts) else {}


@contextmanager
def processor_errors() -> Iterator[None]:
    """Raises `UserError` for what a processor refuses, such as a picture 200 times as wide as high, the mark of a video
    in the text, or settings of the checkpoint that it cannot use. Errors of memory and disk pass."""
    try:
        yield
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:  # what a checkpoint's settings say decides what is raised
        raise UserError(f"the processor cannot prepare this prompt ({reason_of(error)})") from error


def load_config(path: str, **hub: Any) -> Any:
    """The config alone.

    Raises:
        UserError: it cannot be loaded.
    """
    with load_errors("base model config is not valid", path):
        return AutoConfig.from_pretrained(path, **{key: hub[key] for key in HUB_KEYS if key in hub})


def load_processor(path: str, **hub: Any) -> Any:
    """The processor alone.

    Raises:
        UserError: it cannot be loaded.
    """
    load_config(path, **hub)  # which the processor's class reads too
    check_processor_files(Source.of(path, hub, "base model"))
    with load_errors("processor cannot be loaded", path):
        return AutoProcessor.from_pretrained(path, **hub)


def write_chat(
    processor: Any, turns: Sequence[tuple[list[Part], str | None]], system: str | None = None, **settings: Any
) -> str:
    """A conversation in the checkpoint's own chat template.

    Args:
        turns: parts of each question, and its answer; None for the last one leaves it open for the model to answer.
        system: system prompt; None leaves it to the template.
        settings: variables of the template, such as ``enable_thinking``.

    Raises:
        UserError: the template refuses the conversation, or leaves out a part of it, such as its system prompt.
    """
    messages = [] if system is None else [{"role": "system", "content": [text_part(system)]}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": [text_part(answer)]})
    is_open = bool(turns) and turns[-1][1] is None
    if not processor.chat_template:
        fix = "add the chat_template.jinja of its release"
        if getattr(processor.tokenizer, "chat_template", None):
            fix = "its tokenizer has one, which transformers' processor does not read: write it to chat_template.jinja"
        raise UserError("the base model has no chat template", fix=fix)
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=is_open, tokenize=False, **settings)
    except Exception as error:  # a template is a program: it may divide by zero
        raise UserError(f"chat template cannot write this conversation ({reason_of(error)})") from error
    asked = [part["text"] for question, _ in turns for part in question if "text" in part]
    check_written(text, asked if system is None else [system, *asked])
    return text


def without_marks(processor: Any, text: str) -> str:
    """An answer in which the mark of a picture or a video, such as `<image>`, is text: with an invisible character."""
    for name in ("image_token", "video_token"):
        mark = getattr(processor, name, None)
        if mark:
            text = text.replace(mark, f"{mark[0]}{INVISIBLE}{mark[1:]}")
    return text


def parts_of(text: str) -> list[Part]:
    """A question's words and pictures, in order.

    >>> parts_of("<image>\\nWhat?")
    [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    """
    parts: list[Part] = []
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append(IMAGE)
        if piece.strip():
            parts.append(text_part(piece.strip("\n")))
    return parts


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}

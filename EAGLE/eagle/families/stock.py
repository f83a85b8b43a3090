"""Model and processor of a family whose checkpoints transformers reads as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import AutoProcessor, PreTrainedModel

from llava.device import dtype_for
from llava.errors import UserError
from llava.hub import HUB_KEYS
from llava.image import load_image


def load_stock(model_class: type[PreTrainedModel], path: str, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    """Loads both from a folder or the hub.

    Raises:
        UserError: nothing usable is there.
    """
    settings = {"attn_implementation": "sdpa", **{key: value for key, value in kwargs.items() if value is not None}}
    settings["dtype"] = dtype_for(settings.get("dtype", "auto"), settings.get("device_map"))
    processor = load_processor(path, **{key: kwargs[key] for key in HUB_KEYS if key in kwargs})
    with _one_line("base model", path):
        model = model_class.from_pretrained(path, **settings)
    return model, processor


def load_processor(path: str, **hub: Any) -> Any:
    """The processor alone.

    Raises:
        UserError: nothing usable is there.
    """
    with _one_line("processor", path):
        return AutoProcessor.from_pretrained(path, **hub)


@contextmanager
def _one_line(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{what} cannot be loaded", where=path, fix=first_line) from error


def prepare_stock(processor: Any, prompt: str | Sequence[str], images: Sequence[Any]) -> Any:
    """Model inputs of one prompt or several, padded on the left.

    Raises:
        UserError: the prompts mention another number of images than were given.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    pictures = [load_image(image) for image in images]
    marks = sum(text.count(processor.image_token) for text in prompts)
    if marks != len(pictures):
        raise UserError(f"prompt has {marks} image mark(s), but {len(pictures)} picture(s) were given")
    several = len(prompts) > 1
    settings = {"padding": True, "padding_side": "left"} if several else {}
    return processor(text=prompts, images=pictures or None, return_tensors="pt", **settings)


def stock_chat(
    processor: Any, question: str, num_images: int, history: Sequence[tuple[str, str]], system: str | None
) -> str:
    """The checkpoint's own chat template around a question; pictures come before it."""

    def said(role: str, text: str, pictures: int = 0) -> dict[str, Any]:
        return {"role": role, "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}

    messages = [] if system is None else [said("system", system)]
    for asked, answered in history:
        messages += [said("user", asked), said("assistant", answered)]
    messages.append(said("user", question, num_images))
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

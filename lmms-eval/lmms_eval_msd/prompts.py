"""From one lmms-eval request to a prompt and its pictures, the prompt as lmms-eval's `llava_hf` writes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PIL import Image

from llava.errors import UserError
from llava.image import load_image

IMAGE_MARK = "<image>"


def pictures(visuals: Any) -> list[Image.Image]:
    """The pictures that a task's `doc_to_visual` gave: none, one, a list, or a list of lists.

    Raises:
        UserError: it gave something else, such as a video.
    """
    if visuals is None:
        return []
    if isinstance(visuals, Image.Image):
        return [visuals]
    if isinstance(visuals, str):
        if not visuals.lower().endswith(tuple(Image.registered_extensions())):
            raise UserError("the task gives a video or audio file", visuals, "MSD evaluates tasks of pictures and text")
        return [load_image(visuals)]
    if isinstance(visuals, Iterable) and not isinstance(visuals, dict | bytes):
        return [picture for visual in visuals for picture in pictures(visual)]
    raise UserError(f"the task gives a {type(visuals).__name__}", fix="MSD evaluates tasks of pictures and text")


def write_prompt(target: Any, context: str, num_images: int, system: str | None = None) -> str:
    """The conversation around one request's context.

    Args:
        target: an `eagle.model.targets.Target`, which knows its family's conversation.
        context: few-shot examples and question, as the task wrote them.
        num_images: pictures of the request. Without marks in the context they come first, all on one line.
        system: instead of the conversation's own system prompt.
    """
    if target.family != "llava" or not num_images:
        context = context.replace(IMAGE_MARK, "")
    elif IMAGE_MARK not in context:
        context = " ".join([IMAGE_MARK] * num_images) + "\n" + context
    return target.chat_prompt(context, num_images=num_images, system=system)

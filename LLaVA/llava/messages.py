"""Messages of a chat, in the forms of transformers and of OpenAI's API, to text with marks and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import UserError
from .strict import shown

IMAGE_TOKEN = "<image>"
"""Marks a picture in a prompt."""
WRITTEN_MARK = "<image\ue000"
"""Stands in a prompt for the text `<image>` that is no picture; as long as the text."""
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
PICTURE_KEYS = ("image", "image_url", "url", "path", "base64")
ROLES = ("system", "user", "assistant")
AS_CODE = "{'type':'text','text':"
"""A part of a message as Python writes it, without white space."""


def as_text(text: str) -> str:
    """A text in which `<image>` is not a picture, such as an answer.

    >>> IMAGE_TOKEN in as_text("The tag <image> is HTML.")
    False
    """
    return text.replace(IMAGE_TOKEN, WRITTEN_MARK)


def read_message(message: Any) -> tuple[str, str, list[Any]]:
    """Role, text with a mark for each picture, and the pictures that the message brings.

    A part without a picture of its own marks a place for one that the processor is given.

    >>> read_message({"role": "user", "content": [{"type": "image", "url": "a"}, {"type": "text", "text": "What?"}]})
    ('user', '<image>\\nWhat?', ['a'])

    Raises:
        UserError: it is not such a message.
    """
    if not isinstance(message, Mapping) or "role" not in message:
        raise UserError(f"message {str(message)[:60]!r}", fix='give {"role": ..., "content": ...}')
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise UserError(f"message of role {role!r}", fix=f"roles are {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, content if role == "user" else as_text(content), []
    if not isinstance(content, Sequence):
        raise UserError(f"message with content {content!r}", fix="give a text or a list of parts")
    written, pictures = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in IMAGE_PARTS and role == "user":
            written += f"{IMAGE_TOKEN}\n"
            if (picture := _picture_of(part)) is not None:
                pictures.append(picture)
        elif kind in TEXT_PARTS and isinstance(part.get("text"), str):
            written += as_text(part["text"])
        else:
            raise UserError(
                f"part {str(part)[:60]!r} of a message of role {role}", fix="give texts, and pictures by the user"
            )
    return role, written, pictures


def _picture_of(part: Mapping[str, Any]) -> Any:
    key = next((key for key in PICTURE_KEYS if part.get(key) is not None), None)
    value = None if key is None else part[key]
    if isinstance(value, Mapping):  # OpenAI's {"url": ...}
        value = value.get("url")
    return f"data:;base64,{value}" if key == "base64" else value


def check_written(written: str, texts: Iterable[str]) -> None:
    """Checks that a chat template has written the texts that it was given, but for white space.

    Raises:
        UserError: it leaves one out, such as a system prompt, or writes a list of parts as Python does.
    """
    found, as_code = "".join(written.split()), False
    for text in texts:
        given = "".join(text.split())
        if given not in found:
            raise UserError(f"chat template leaves out {shown(text)}", fix="leave it out too, or use another template")
        as_code |= AS_CODE in found and AS_CODE not in given
    if as_code:
        raise UserError("chat template is for texts, not for pictures", fix="use that of the model's release")


def parts_of(text: str, marks: bool) -> list[dict[str, str]]:
    """A message as chat templates of processors read it; with `marks`, each `<image>` is a picture.

    >>> parts_of("<image>\\nWhat?", marks=True)
    [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    """
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_TOKEN) if marks else [text]):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece.strip() or not marks:
            parts.append({"type": "text", "text": piece})
    return parts

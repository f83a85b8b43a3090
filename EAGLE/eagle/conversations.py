"""Records of an annotation file: their turns and their pictures. Knows no template and no tokenizer.

Reads LLaVA's records (``conversations``, ``image``) and the variants of ShareGPT's (``items``; many names of the two
speakers). A record that cannot be used raises `Unusable` with a key of `REASONS`, by which skipped records are counted.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from llava.errors import UserError
from llava.image import PictureUnreachable, load_image

USER, ASSISTANT, SYSTEM = "human", "gpt", "system"
ROLES = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "system": SYSTEM,
}
TURN_KEYS = ("conversations", "items")
IMAGE_KEYS = ("image", "images")
MARK = "<image>"
"""Stands for a picture in a question."""
MAX_ID = 256

REASONS = {
    "no_conversation": "the record has no list of turns, or a turn without a known speaker and a text",
    "id": f"the record's id is neither an integer nor a string of at most {MAX_ID} characters",
    "empty": "a question is empty, or all answers are",
    "not_alternating": "two turns of the same speaker follow each other",
    "no_mark": f"the record names a picture, its text has no {MARK}",
    "too_many_marks": f"the text has more {MARK} marks than the record names pictures",
    "too_few_marks": f"the record names more pictures than the text has {MARK} marks",
    "image_name": "the record's picture is neither a string nor a list of strings",
    "outside_picture": "a picture's name leads out of the folder of pictures",
    "missing_picture": "a picture's file does not exist",
    "broken_picture": "a picture's file cannot be read",
    "text": "the tokenizer cannot encode the text",
    "template": "the model's chat template does not write the conversation turn after turn",
    "image_cut": "the longest allowed sequence would cut through the image tokens",
    "answer_cut": "nothing of an answer is left in the longest allowed sequence",
    "answer_picture": "the target's own answer contains an image token",
    "too_large": "memory does not suffice for the conversation, even alone",
    "not_finite": "the target's hidden states are not finite numbers",
}
NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
"""Errors for a name that no file has, or can have. Any other error is the file system's."""
FIX_ACCESS = "check the disk, the network share and the permissions, then run again; finished work is kept"


class Unusable(Exception):
    """A record that cannot be used. ``reason``: a key of `REASONS`."""

    def __init__(self, reason: str) -> None:
        assert reason in REASONS
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """Turns (question, answer). ``images``: names of the pictures, in the order of the marks; ``system``: None where
    the record has no system prompt."""

    id: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...] = ()
    system: str | None = None


def claims_pictures(record: Mapping[str, Any]) -> bool:
    """Whether a record names pictures, in whatever form."""
    return _image_value(record) is not None


def image_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a record's pictures (``image`` or ``images``: a name or a list of names); empty for a text record.

    Raises:
        Unusable: the value is something else, or a name leads out of the folder of pictures.
    """
    value = _image_value(record)
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise Unusable("image_name")
    for name in names:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            raise Unusable("outside_picture")
    return tuple(names)


def _image_value(record: Mapping[str, Any]) -> Any:
    values = (record.get(key) for key in IMAGE_KEYS)
    return next((value for value in values if value is not None and value not in ("", [])), None)


def record_id(record: Mapping[str, Any], number: int) -> str:
    """A record's id as text; its number where it has none.

    Raises:
        Unusable: the id is neither an integer nor a short string.
    """
    value = record.get("id")
    if value is None:
        return str(number)
    if type(value) not in (str, int) or len(str(value)) > MAX_ID:
        raise Unusable("id")
    return str(value)


def id_to_show(record: Mapping[str, Any], number: int) -> str:
    """As `record_id`, for a record that is skipped: its number where the id is unusable."""
    try:
        return record_id(record, number)
    except Unusable:
        return str(number)


def read_conversation(record: Mapping[str, Any], number: int, keep_answers: bool = True) -> Conversation:
    """The conversation of a record.

    As in the published recipe, an answer before the first question is dropped, and so is a last question without
    answer.

    Args:
        number: the record's number in its file; its id where it has none.
        keep_answers: False replaces the answers by "" and keeps a last question without answer.

    Raises:
        Unusable: see `REASONS`.
    """
    name = record_id(record, number)
    system, turns = _parse_turns(_turns(record))
    while turns and turns[0][0] == ASSISTANT:
        turns = turns[1:]
    if turns and turns[-1][0] == USER:
        turns = turns[:-1] if keep_answers else [*turns, (ASSISTANT, "")]
    if any(role != (USER, ASSISTANT)[place % 2] for place, (role, _) in enumerate(turns)):
        raise Unusable("not_alternating")
    texts = [text if keep_answers or role == USER else "" for role, text in turns]
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    no_answer = keep_answers and not any(answer.strip() for _, answer in pairs)
    if not pairs or no_answer or not all(question.strip() for question, _ in pairs):
        raise Unusable("empty")
    if not all(map(_is_unicode, [*texts, system or ""])):
        raise Unusable("text")
    images = image_names(record)
    _check_marks(texts, len(images))
    return Conversation(name, pairs, images, system)


def _turns(record: Mapping[str, Any]) -> Sequence[Any]:
    value = next((record[key] for key in TURN_KEYS if record.get(key) is not None), None)
    if isinstance(value, list):
        return value
    raise Unusable("no_conversation")


def _parse_turns(turns: Sequence[Any]) -> tuple[str | None, list[tuple[str, str]]]:
    """(system prompt, [(USER or ASSISTANT, text)])."""
    system, parsed = None, []
    for turn in turns:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(text, str):
            raise Unusable("no_conversation")
        role = ROLES[speaker]
        if role != SYSTEM:
            parsed.append((role, text))
        elif system is None and not parsed:
            system = text
        else:
            raise Unusable("not_alternating")
    return system, parsed


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can express and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_marks(texts: Sequence[str], images: int) -> None:
    marks = sum(text.count(MARK) for text in texts)
    if images and not marks:
        raise Unusable("no_mark")
    if marks > images:
        raise Unusable("too_many_marks")
    if marks < images:
        raise Unusable("too_few_marks")


def picture_is_there(path: Path) -> bool:
    """Whether a picture's file exists.

    Raises:
        UserError: the file system cannot tell.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except ValueError:  # a name that no file can have
        return False
    except OSError as error:
        if error.errno in NO_SUCH_FILE:
            return False
        raise UserError(f"picture cannot be read ({error.strerror})", path, FIX_ACCESS) from None


def open_picture(path: Path) -> Image.Image:
    """A record's picture as RGB.

    Raises:
        Unusable: it is missing or broken.
        UserError: the file system does not let it be read. The record is not at fault, so it is not skipped.
    """
    if not picture_is_there(path):
        raise Unusable("missing_picture")
    try:
        return load_image(path)
    except PictureUnreachable as error:
        raise UserError(error.what, error.where, FIX_ACCESS) from None
    except UserError:
        raise Unusable("broken_picture") from None

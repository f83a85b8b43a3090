"""From a row of an annotation file to turns, with the pictures they speak of. Knows no template and no tokenizer.

Understands LLaVA's rows (``conversations``, ``image``) and the variants of ShareGPT's (``items``; many names of the
two speakers). A row that cannot be used raises `Unusable` with one of `REASONS`; these are what skipped rows are
counted by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

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
MAX_ID = 256

REASONS = {
    "no_conversation": "the row has no list of turns, or a turn without a known speaker and a text",
    "id": f"the row's id is no whole number and no text of at most {MAX_ID} characters",
    "empty": "a question says nothing, or no answer does",
    "not_alternating": "two turns in a row of the same speaker",
    "no_mark": f"the row names a picture, its text has no {MARK}",
    "too_many_marks": f"the text has more {MARK} marks than the row names pictures",
    "too_few_marks": f"the row names more pictures than the text has {MARK} marks",
    "image_name": "the row's picture is no text and no list of texts",
    "outside_picture": "a picture's name leads out of the folder of pictures",
    "missing_picture": "a picture's file is not there",
    "broken_picture": "a picture's file cannot be read",
    "text": "the tokenizer cannot write the text",
    "template": "the model's chat template does not write the conversation turn after turn",
    "image_cut": "the longest allowed sequence would cut through the image tokens",
    "answer_cut": "nothing of an answer is left in the longest allowed sequence",
    "answer_picture": "the target's own answer has the token of a picture",
    "too_large": "memory does not suffice for the conversation, even alone",
    "not_finite": "the target's hidden states are not finite numbers",
}


class Unusable(Exception):
    """A row that cannot be used, and why: a key of `REASONS`."""

    def __init__(self, reason: str) -> None:
        assert reason in REASONS
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """Turns (question, answer); ``system`` where the row brings its own; ``images``: names of the pictures in mark
    order."""

    id: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...] = ()
    system: str | None = None


def claims_pictures(row: Mapping[str, Any]) -> bool:
    """Whether a row names pictures, in whatever form."""
    return _image_value(row) is not None


def image_names(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a row's pictures (``image`` or ``images``: a name or a list of names); empty for a text row.

    Raises:
        Unusable: the value is something else, or a name leads out of the folder of pictures.
    """
    value = _image_value(row)
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise Unusable("image_name")
    for name in names:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            raise Unusable("outside_picture")
    return tuple(names)


def _image_value(row: Mapping[str, Any]) -> Any:
    values = (row.get(key) for key in IMAGE_KEYS)
    return next((value for value in values if value is not None and value not in ("", [])), None)


def row_id(row: Mapping[str, Any], number: int) -> str:
    """A row's id as text; the row's number where it has none.

    Raises:
        Unusable: the id is no whole number and no short text.
    """
    value = row.get("id")
    if value is None:
        return str(number)
    if type(value) not in (str, int) or len(str(value)) > MAX_ID:
        raise Unusable("id")
    return str(value)


def id_to_show(row: Mapping[str, Any], number: int) -> str:
    """As `row_id`, for a row that is skipped: its number where the id is unusable."""
    try:
        return row_id(row, number)
    except Unusable:
        return str(number)


def read_conversation(row: Mapping[str, Any], number: int, keep_answers: bool = True) -> Conversation:
    """The conversation of a row.

    As the published recipe does it, an answer before the first question is dropped; so is a last question without
    answer.

    Args:
        number: the row's number, its id where it has none.
        keep_answers: False where they are not wanted: they become "", and a last question without answer stays.

    Raises:
        Unusable: see `REASONS`.
    """
    name = row_id(row, number)
    system, turns = _speech(_turns(row))
    while turns and turns[0][0] == ASSISTANT:
        turns = turns[1:]
    if turns and turns[-1][0] == USER:
        turns = turns[:-1] if keep_answers else [*turns, (ASSISTANT, "")]
    if any(role != (USER, ASSISTANT)[place % 2] for place, (role, _) in enumerate(turns)):
        raise Unusable("not_alternating")
    texts = [text if keep_answers or role == USER else "" for role, text in turns]
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    silent = keep_answers and not any(answer.strip() for _, answer in pairs)
    if not pairs or silent or not all(question.strip() for question, _ in pairs):
        raise Unusable("empty")
    if not all(map(_is_unicode, [*texts, system or ""])):
        raise Unusable("text")
    images = image_names(row)
    _check_marks(texts, len(images))
    return Conversation(name, pairs, images, system)


def _turns(row: Mapping[str, Any]) -> Sequence[Any]:
    value = next((row[key] for key in TURN_KEYS if row.get(key) is not None), None)
    if isinstance(value, list):
        return value
    raise Unusable("no_conversation")


def _speech(turns: Sequence[Any]) -> tuple[str | None, list[tuple[str, str]]]:
    """(system prompt, [(USER or ASSISTANT, text)])."""
    system, spoken = None, []
    for turn in turns:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(text, str):
            raise Unusable("no_conversation")
        role = ROLES[speaker]
        if role != SYSTEM:
            spoken.append((role, text))
        elif system is None and not spoken:
            system = text
        else:
            raise Unusable("not_alternating")
    return system, spoken


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write and no tokenizer takes."""
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

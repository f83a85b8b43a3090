"""From a row of an annotation file to turns, with the pictures they speak of. Knows no template and no tokenizer.

Understands LLaVA's rows (``conversations``, ``image``) and the variants of ShareGPT's (``items``; many names of the
two speakers). A row that cannot be used raises `Unusable` with one of `REASONS`; these are what skipped rows are
counted by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

USER, ASSISTANT, SYSTEM = "human", "gpt", "system"
ROLES = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "system": SYSTEM,
}
TURN_KEYS = ("conversations", "items")
MARK = "<image>"

REASONS = {
    "no_conversation": "the row has no list of turns, or a turn without a known speaker and a text",
    "empty": "no turn of a user with an answer that says something",
    "not_alternating": "two turns in a row of the same speaker",
    "no_mark": f"the row names a picture, its text has no {MARK}",
    "too_many_marks": f"the text has more {MARK} marks than the row names pictures",
    "too_few_marks": f"the row names more pictures than the text has {MARK} marks",
    "missing_picture": "a picture's file is not there",
    "broken_picture": "a picture's file cannot be read",
    "text": "the tokenizer cannot write the text",
    "template": "the model's chat template does not write the conversation turn after turn",
    "image_cut": "the longest allowed sequence would cut through the image tokens",
    "answer_cut": "nothing of an answer is left in the longest allowed sequence",
    "answer_picture": "the target's own answer has the token of a picture",
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


def image_names(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a row's pictures (``image`` or ``images``: a name or a list of names); empty for a text row."""
    value = row.get("image") or row.get("images") or []
    return tuple(str(name) for name in (value if isinstance(value, list) else [value]))


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
    system, turns = _speech(_turns(row))
    while turns and turns[0][0] == ASSISTANT:
        turns = turns[1:]
    if turns and turns[-1][0] == USER:
        turns = turns[:-1] if keep_answers else [*turns, (ASSISTANT, "")]
    if any(role != (USER, ASSISTANT)[place % 2] for place, (role, _) in enumerate(turns)):
        raise Unusable("not_alternating")
    texts = [text if keep_answers or role == USER else "" for role, text in turns]
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    if not pairs or (keep_answers and not any(answer.strip() for _, answer in pairs)):
        raise Unusable("empty")
    if any(not _is_unicode(text) for text in texts):
        raise Unusable("text")
    images = image_names(row)
    _check_marks(texts, len(images))
    return Conversation(str(row.get("id", number)), pairs, images, system)


def _turns(row: Mapping[str, Any]) -> Sequence[Any]:
    for key in TURN_KEYS:
        if isinstance(row.get(key), list):
            return row[key]
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

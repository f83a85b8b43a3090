"""Records of an annotation file: their turns and their pictures. Knows no template and no tokenizer.

Reads LLaVA's records (``conversations``, ``image``), the variants of ShareGPT's (``items``; many names of the two
speakers) and OpenAI's (``messages`` with role and content, a text or parts). A record that cannot be used raises
`Unusable` with a key of `REASONS`, by which skipped records are counted.
"""

from __future__ import annotations

import errno
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from llava.errors import UserError
from llava.image import PictureUnreachable, load_image
from llava.inputs import is_unicode

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
    "developer": SYSTEM,
}
TURN_KEYS = ("conversations", "items", "messages")
IMAGE_KEYS = ("image", "images")
OTHER_MEDIA = ("video", "videos", "audio", "audios")
"""Keys of inputs that the training templates do not write."""
KNOWN_KEYS = frozenset(("id", "system", *TURN_KEYS, *IMAGE_KEYS, *OTHER_MEDIA, "model", "source"))
"""Keys of a record; the last two say where it comes from."""
CUT = "cut"
"""Key of an answer that ends at a limit of length, without an end token."""
TURN_FIELDS = ("from", "value", "role", "content", CUT)
TOOLS = ("tool_calls", "function_call")
"""Keys of a turn that calls tools."""
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
MARK = "<image>"
"""Stands for a picture in a question."""
MAX_ID = 256
MAX_UNKNOWN, MAX_NAMED = 1000, 8
"""Unknown keys of a file that are counted, and those that a note names."""

REASONS = {
    "no_conversation": "the record has no list of turns, or two of them, or a turn without a known speaker and a text",
    "two_values": "a turn has both from and role, or both value and content, and they differ",
    "cut": f"a turn's mark '{CUT}' is neither true nor false, or stands at a question",
    "tools": "a turn calls tools, which the training templates do not write",
    "id": f"the record's id is neither an integer nor a text of at most {MAX_ID} characters",
    "system": "the record's system prompt is not a text, or it has two of them",
    "video": "the record has a video or sound, which the training templates do not write",
    "empty": "a question is empty, or all answers are",
    "not_alternating": "two turns of the same speaker follow each other",
    "no_mark": f"the record names a picture, its text has no {MARK}",
    "too_many_marks": f"the text has more {MARK} marks than the record names pictures",
    "too_few_marks": f"the record names more pictures than the text has {MARK} marks",
    "image_name": "the record's pictures are not names of files, or two keys name different ones",
    "outside_picture": "a picture is not inside the folder of pictures",
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
    the record has no system prompt; ``cut``: numbers of the turns whose answer ends without an end token."""

    id: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...] = ()
    system: str | None = None
    cut: frozenset[int] = frozenset()


def count_unknown_keys(record: Mapping[str, Any], counts: Counter[str]) -> None:
    """Counts the keys of a record and of its turns that are not read, of at most `MAX_UNKNOWN` names."""
    turns = [turn for turn in turns_of(record) or () if isinstance(turn, Mapping)]
    in_turns = {key for turn in turns for key in turn if key not in TURN_FIELDS and turn[key] not in (None, "", [])}
    unknown = [*(key for key in record if key not in KNOWN_KEYS), *(f"turn: {key}" for key in sorted(in_turns))]
    counts.update(key for key in unknown if key in counts or len(counts) < MAX_UNKNOWN)


def unknown_keys_note(counts: Mapping[str, int]) -> str | None:
    """One line that names the keys that are not read, the most frequent first; None without any."""
    if not counts:
        return None
    named = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{key[:40]!r} ({count:,} records)" for key, count in named[:MAX_NAMED])
    more = f" and {len(named) - MAX_NAMED:,} more" if len(named) > MAX_NAMED else ""
    return f"keys that are not read: {shown}{more}"


def claims_pictures(record: Mapping[str, Any]) -> bool:
    """Whether a record names pictures, in whatever form."""
    return any(map(record.get, IMAGE_KEYS)) or any(_is_picture(part) for part in _parts(record))


def image_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a record's pictures: in ``image`` or ``images`` (a name or a list of names), or in the parts of its
    turns; empty for a text record.

    Raises:
        Unusable: the value is something else, such as a URL, or a name has "..", which leads out of its folder.
    """
    value = _image_value(record)
    names = [] if value is None else value if isinstance(value, list) else [value]
    in_parts = [_picture_of(part) for part in _parts(record) if _is_picture(part)]
    if any(name is not None for name in in_parts):  # parts without a name stand for those of the record
        if names and names != in_parts:
            raise Unusable("image_name")
        names = in_parts
    if not all(isinstance(name, str) and name for name in names):
        raise Unusable("image_name")
    for name in names:
        if "://" in name or name.startswith("data:"):
            raise Unusable("image_name")
        if ".." in PurePath(name).parts:
            raise Unusable("outside_picture")
    return tuple(names)


def picture_path(root: Path, name: str) -> Path:
    """Where a picture is. A name is relative to ``root``, the folder of pictures, or absolute and inside it.

    Raises:
        Unusable: it is absolute and not inside.
    """
    path = root / name
    if PurePath(name).is_absolute() and not any(map(path.is_relative_to, (root.absolute(), root.resolve()))):
        raise Unusable("outside_picture")
    return path


def turns_of(record: Mapping[str, Any]) -> list[Any] | None:
    """The record's list of turns, in the form that it has; None without one."""
    values = [record[key] for key in TURN_KEYS if record.get(key) is not None]
    filled = [value for value in values if value] or values[:1]
    return filled[0] if len(filled) == 1 and isinstance(filled[0], list) else None


def speaker_and_content(turn: Any) -> tuple[Any, Any]:
    """``from`` and ``value``, or ``role`` and ``content``; None where the turn has neither."""
    if not isinstance(turn, Mapping):
        return None, None
    return turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def check_turn(turn: Any) -> None:
    """Raises `Unusable` for a turn whose speaker or text is there twice with different values, or that calls tools."""
    if not isinstance(turn, Mapping):
        return
    if any(turn.get(key) for key in TOOLS):
        raise Unusable("tools")
    if not isinstance(turn.get(CUT), bool | None):
        raise Unusable("cut")
    speakers = [turn[key] for key in ("from", "role") if turn.get(key) is not None]
    speakers = [ROLES.get(each, each) if isinstance(each, str) else each for each in speakers]
    contents = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
    if any(each != values[0] for values in (speakers, contents) for each in values):
        raise Unusable("two_values")


def text_of(content: Any) -> str:
    """A turn's content as text, with a `MARK` for each picture.

    >>> text_of([{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}])
    '<image>\\nWhat?'

    Raises:
        Unusable: it is neither a text nor a list of texts and pictures.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Unusable("no_conversation")
    return "".join(map(_text_of_part, content))


def _text_of_part(part: Any) -> str:
    if _is_picture(part):
        return f"{MARK}\n"
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
    if isinstance(kind, str) and any(word in kind for word in ("video", "audio")):
        raise Unusable("video")
    if kind not in TEXT_PARTS or not isinstance(text, str):
        raise Unusable("no_conversation")
    return text


def _parts(record: Mapping[str, Any]) -> list[Any]:
    contents = (speaker_and_content(turn)[1] for turn in turns_of(record) or ())
    return [part for content in contents if isinstance(content, list) for part in content]


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS


def _picture_of(part: Mapping[str, Any]) -> Any:
    """The picture that a part names; None if it only marks a place."""
    value = next((part[key] for key in ("image_url", "image", "path", "url") if part.get(key) is not None), None)
    return value.get("url", value) if isinstance(value, Mapping) else value


def _image_value(record: Mapping[str, Any]) -> Any:
    values = [value for key in IMAGE_KEYS if (value := record.get(key)) is not None and value not in ("", [])]
    if any(value != values[0] for value in values):
        raise Unusable("image_name")
    return values[0] if values else None


def record_id(record: Mapping[str, Any], number: int) -> str:
    """A record's id as text; its number where it has none.

    Raises:
        Unusable: the id is neither an integer nor a short string.
    """
    value = record.get("id")
    if value is None:
        return str(number)
    if type(value) not in (str, int) or len(str(value)) > MAX_ID or not is_unicode(str(value)):
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
    if any(record.get(key) not in (None, "", []) for key in OTHER_MEDIA):
        raise Unusable("video")
    system, turns = _parse_turns(turns_of(record))
    system = _one_system(record.get("system"), system)
    while turns and turns[0][0] == ASSISTANT:
        turns = turns[1:]
    if turns and turns[-1][0] == USER:
        turns = turns[:-1] if keep_answers else [*turns, (ASSISTANT, "", False)]
    if len(turns) % 2 or any(role != (USER, ASSISTANT)[place % 2] for place, (role, _, _) in enumerate(turns)):
        raise Unusable("not_alternating")
    if any(cut for role, _, cut in turns if role == USER):
        raise Unusable("cut")
    texts = [text if keep_answers or role == USER else "" for role, text, _ in turns]
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    no_answer = keep_answers and not any(answer.strip() for _, answer in pairs)
    if not pairs or no_answer or not all(question.strip() for question, _ in pairs):
        raise Unusable("empty")
    if not all(map(is_unicode, [*texts, system or ""])):
        raise Unusable("text")
    images = image_names(record)
    _check_marks(texts, len(images))
    cut = frozenset(place // 2 for place, (_, _, is_cut) in enumerate(turns) if is_cut and keep_answers)
    return Conversation(name, pairs, images, system, cut)


def _parse_turns(turns: Sequence[Any] | None) -> tuple[str | None, list[tuple[str, str, bool]]]:
    """(system prompt, [(USER or ASSISTANT, text, whether it is cut)])."""
    if turns is None:
        raise Unusable("no_conversation")
    system: str | None = None
    parsed: list[tuple[str, str, bool]] = []
    for turn in turns:
        check_turn(turn)
        speaker, content = speaker_and_content(turn)
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise Unusable("no_conversation")
        role, text = ROLES[speaker], text_of(content)
        if role != SYSTEM:
            parsed.append((role, text, bool(turn.get(CUT))))
        elif system is None and not parsed:
            system = text
        else:
            raise Unusable("not_alternating")
    return system, parsed


def _one_system(key: Any, turn: str | None) -> str | None:
    """The system prompt of a record. ``key``: the value of its key ``system``; ``turn``: its system turn."""
    if key is None or key == "":
        return turn
    if not isinstance(key, str) or turn not in (None, key):
        raise Unusable("system")
    return key


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

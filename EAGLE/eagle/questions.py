"""Question files: one JSON object a line, ``{"id", "images", "question", "answer"}``."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.inputs import check_text
from llava.strict import reject_unknown


@dataclass(frozen=True)
class Question:
    """One question; ``images`` are paths of existing files."""

    id: str
    question: str
    images: tuple[Path, ...] = ()
    answer: str = ""

    def inputs(self, target: Any) -> dict[str, Any]:
        """Model inputs of the question in the conversation template of ``target``, a `Target`."""
        inputs = target.prepare(target.chat_prompt(self.question, num_images=len(self.images)), self.images)
        target.check_length(inputs, where=f"question {self.id}")
        return dict(inputs)


@dataclass(frozen=True)
class Group:
    """Questions that are answered together, as one batch."""

    questions: tuple[Question, ...]

    def inputs(self, target: Any) -> dict[str, Any]:
        """Padded model inputs of all of them, [B, S]."""
        prompts = [target.chat_prompt(each.question, num_images=len(each.images)) for each in self.questions]
        inputs = target.prepare(prompts, [image for each in self.questions for image in each.images])
        target.check_length(inputs, where=f"one of the questions {', '.join(each.id for each in self.questions)}")
        return dict(inputs)


KEYS = ("id", "images", "image", "question", "answer", "kind", "type", "facts", "exchange")
"""Keys of a question. ``image`` is a single picture. From ``kind`` on they are for evaluations."""


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Reads a question file, at most the first ``limit`` questions.

    Raises:
        UserError: the file is missing or empty, or a line is not a JSON object, has no question, an unknown key, or a
            picture that does not exist.
    """
    questions = [question for question, _ in islice(iter_questions(path), limit)]
    if not questions:
        raise UserError("question file is empty", where=path, fix="one JSON object a line")
    return questions


def iter_questions(path: Path) -> Iterator[tuple[Question, dict[str, Any]]]:
    """The questions of a file, each with its JSON object. Raises as `read_questions`."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"question file cannot be read ({error.strerror})", where=path, fix="check --data") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _record(line, f"{path}:{number}")
            yield _question(record, f"{path}:{number}", path.parent), record


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=f"{where}:{error.start + 1}", fix="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg})", where=f"{where}:{error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"not JSON ({type(error).__name__})", where=where) from None
    if not isinstance(record, dict):
        raise UserError("not a JSON object", where=where, fix='{"id", "images", "question", "answer"}')
    reject_unknown(record, KEYS, where)
    return record


def _question(record: Mapping[str, Any], where: str, folder: Path) -> Question:
    text, answer = record.get("question"), record.get("answer")
    if not isinstance(text, str):
        raise UserError("no 'question'", where=where, fix='{"id", "images", "question", "answer"}')
    if not isinstance(answer, str | int | float | None):
        raise UserError(f"'answer' is {answer!r}", where=where, fix="give a text")
    for name, value in (("question", text), ("answer", answer)):
        if isinstance(value, str):
            check_text(value, f"'{name}'", where)
    images = tuple(folder / name for name in _image_names(record, where))
    for image in images:
        if not _is_file(image):
            raise UserError(f"picture not found: {image}", where=where, fix="paths are relative to the question file")
    return Question(str(record.get("id", where)), text, images, "" if answer is None else str(answer))


def _image_names(record: Mapping[str, Any], where: str) -> list[str]:
    if record.get("images") is not None and record.get("image") is not None:
        raise UserError("both 'images' and 'image'", where=where, fix="give one of them")
    given = record.get("image") if record.get("images") is None else record["images"]
    names = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"pictures {given!r}", where=where, fix='give "images": [paths]')
    return names


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def pick_questions(questions: Sequence[Question], count: int) -> list[Question]:
    """At most ``count`` questions to show: one for each picture, those with the longest reference answers, evenly
    spread over the file.

    Raises:
        UserError: no question has a picture.
    """
    pictures: dict[Path, Question] = {}
    for question in questions:
        if question.images:
            kept = pictures.setdefault(question.images[0], question)
            if len(question.answer) > len(kept.answer):
                pictures[question.images[0]] = question
    if not pictures:
        raise UserError("no question with a picture", fix="name another file with --data")
    longest = sorted(pictures.values(), key=lambda question: -len(question.answer))[: max(count, len(pictures) // 2)]
    order = sorted(longest, key=questions.index)
    step = max(len(order) // count, 1)
    return order[::step][:count]

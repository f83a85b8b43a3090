"""Question files: one JSON object a line, ``{"id", "images", "question", "answer"}``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import UserError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Question:
    """One question; ``images`` are paths of existing files."""

    id: str
    question: str
    images: tuple[Path, ...] = ()
    answer: str = ""

    def inputs(self, target: Any) -> dict[str, Any]:
        """Model inputs of the question in the conversation template of ``target``, a `Target`."""
        return target.prepare(target.chat_prompt(self.question, num_images=len(self.images)), self.images)


@dataclass(frozen=True)
class Group:
    """Questions that are answered together, as one batch."""

    questions: tuple[Question, ...]

    def inputs(self, target: Any) -> dict[str, Any]:
        """Padded model inputs of all of them, [B, S]."""
        prompts = [target.chat_prompt(each.question, num_images=len(each.images)) for each in self.questions]
        return target.prepare(prompts, [image for each in self.questions for image in each.images])


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Reads a question file, at most the first ``limit`` questions.

    Raises:
        UserError: the file is missing or empty, a line is not a JSON object, has no question, or names a picture that
            does not exist.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"question file cannot be read ({error})", where=path, fix="check --data") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError("question file is empty", where=path, fix="one JSON object a line")
    return [_question(line, f"{path}:{number}", path.parent) for number, line in numbered[:limit]]


def _question(line: str, where: str, folder: Path) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg})", where=f"{where}:{error.colno}") from error
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise UserError("no 'question'", where=where, fix='{"id", "images", "question", "answer"}')
    images = tuple(folder / name for name in record.get("images", ()))
    for image in images:
        if not image.is_file():
            raise UserError(f"picture not found: {image}", where=where, fix="paths are relative to the question file")
    return Question(str(record.get("id", where)), record["question"], images, record.get("answer", ""))


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

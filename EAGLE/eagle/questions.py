"""Question files: one JSON object a line, ``{"id", "images", "question", "answer"}``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import UserError


@dataclass(frozen=True)
class Question:
    """One question; ``images`` are paths that exist."""

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
    """Reads a question file.

    Raises:
        UserError: the file is missing or empty, a line is no JSON object, has no question, or names a missing picture.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"question file cannot be read ({error})", where=path, fix="check --data") from error
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError("question file is empty", where=path, fix="one JSON object a line")
    return [_question(line, f"{path}:{number}", path.parent) for number, line in rows[:limit]]


def _question(line: str, where: str, folder: Path) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg})", where=f"{where}:{error.colno}") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise UserError("no 'question'", where=where, fix='{"id", "images", "question", "answer"}')
    images = tuple(folder / name for name in row.get("images", ()))
    for image in images:
        if not image.is_file():
            raise UserError(f"picture not found: {image}", where=where, fix="paths are relative to the question file")
    return Question(str(row.get("id", where)), row["question"], images, row.get("answer", ""))

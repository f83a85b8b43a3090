"""Question files: one JSON object a line, ``{"id", "images", "question", "answer"}``.

    python -m eagle.questions fetch mmspec --subset testmini     # a published suite as such a file, with its pictures

A conversation has ``"turns"``, the user's turns, in place of ``"question"``. Its pictures belong to the first one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

from llava.errors import UserError
from llava.files import DuplicateKey, unique_keys
from llava.inputs import check_text
from llava.strict import reject_unknown, shown


@dataclass(frozen=True)
class Question:
    """One question; ``images`` are paths of existing files; ``source``: the data set that it is from, if that is known.

    A turn of a conversation has the conversation's id in ``conversation`` and the turns before it in ``earlier``.
    ``answers`` to them come from the model that is asked (`Conversations`).
    """

    id: str
    question: str
    images: tuple[Path, ...] = ()
    answer: str = ""
    source: str = ""
    conversation: str = ""
    earlier: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def inputs(self, target: Any) -> dict[str, Any]:
        """Model inputs of the question in the conversation template of ``target``, a `Target`."""
        history = list(zip(self.earlier, self.answers, strict=True))
        prompt = target.chat_prompt(self.question, num_images=len(self.images), history=history)
        inputs = target.prepare(prompt, self.images)
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


class Conversations:
    """What one model has answered in conversations, so that it is asked each later turn after its own answers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.said: dict[str, tuple[str, ...]] = {}

    def ask(self, question: Question) -> Question:
        """The question with this model's answers to the turns before it. Those were asked earlier, in order."""
        return replace(question, answers=self.said[question.conversation]) if question.earlier else question

    def keep(self, question: Question, tokens: Sequence[int]) -> None:
        """Remembers the answer to a question of `ask`."""
        if question.conversation:
            text = self.model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            self.said[question.conversation] = (*question.answers, text)


KEYS = ("id", "images", "image", "question", "turns", "answer", "source", "kind", "type", "facts", "exchange")
"""Keys of a question. ``image`` is a single picture. From ``kind`` on they are for evaluations."""


def read_questions(path: Path, limit: int | None = None, turns: bool = False) -> list[Question]:
    """Reads a question file, at most the first ``limit`` lines with a question.

    Args:
        turns: takes conversations too; each of their turns is a question, with the id ``conversation/number``.

    Raises:
        UserError: the file is missing or empty, or a line is not a JSON object, has no question, an unknown key, a
            picture that does not exist, or several turns without ``turns``.
    """
    records = islice(_records(path), limit)
    questions = [each for record, where in records for each in _questions(record, where, path.parent, turns)]
    if not questions:
        raise UserError("question file is empty", where=path, fix="one JSON object a line")
    return questions


def iter_questions(path: Path) -> Iterator[tuple[Question, dict[str, Any]]]:
    """The questions of a file, each with its JSON object. Raises as `read_questions`, conversations too."""
    for record, where in _records(path):
        for question in _questions(record, where, path.parent, turns=False):
            yield question, record


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The JSON objects of a file, each with its place."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"question file cannot be read ({error.strerror})", where=path, fix="check --data") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _record(line, f"{path}:{number}"), f"{path}:{number}"


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=f"{where}:{error.start + 1}", fix="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg})", where=f"{where}:{error.colno}") from None
    except DuplicateKey as error:
        raise UserError(str(error), where=where, fix="keep one of its values") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"not JSON ({type(error).__name__})", where=where) from None
    if not isinstance(record, dict):
        raise UserError("not a JSON object", where=where, fix='{"id", "images", "question", "answer"}')
    reject_unknown(record, KEYS, where)
    return record


def _questions(record: Mapping[str, Any], where: str, folder: Path, turns: bool) -> Iterator[Question]:
    """The question of a record, or the turns of its conversation."""
    given = record.get("turns")
    if given is None:
        yield _question(record, where, folder)
        return
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise UserError(f"'turns' is {str(given)[:80]}", where=where, fix="give a list of the user's turns")
    if record.get("question") is not None:
        raise UserError("both 'question' and 'turns'", where=where, fix="give one of them")
    if len(given) > 1 and not turns:
        raise UserError("a conversation of several turns", where=where, fix="only for msd verify and msd bench")
    for number, text in enumerate(given):
        question = _question({**record, "question": text}, where, folder)
        if len(given) > 1:
            name = f"{question.id}/{number + 1}"
            question = replace(question, id=name, conversation=question.id, earlier=tuple(given[:number]))
        yield question


def _question(record: Mapping[str, Any], where: str, folder: Path) -> Question:
    text, answer = record.get("question"), record.get("answer")
    if not isinstance(text, str):
        raise UserError("no 'question'", where=where, fix='{"id", "images", "question", "answer"}')
    if not isinstance(answer, str | int | float | None):
        raise UserError(f"'answer' is {answer!r}", where=where, fix="give a text")
    source = record.get("source") or ""
    if not isinstance(source, str):
        raise UserError(f"'source' is {source!r}", where=where, fix="give the name of a data set")
    name = record.get("id")
    if type(name) not in (str, int, NoneType):
        raise UserError(f"'id' is {shown(name)}", where=where, fix="give a text or a whole number")
    for key, value in (("id", name), ("question", text), ("answer", answer), ("source", source)):
        if isinstance(value, str):
            check_text(value, f"'{key}'", where)
    images = tuple(folder / name for name in _image_names(record, where))
    for image in images:
        if not _is_file(image):
            raise UserError(f"picture not found: {image}", where=where, fix="paths are relative to the question file")
    return Question(where if name is None else str(name), text, images, "" if answer is None else str(answer), source)


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

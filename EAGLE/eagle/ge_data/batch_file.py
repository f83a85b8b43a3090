"""Files of OpenAI's batch format: requests for answers, which ``vllm run-batch`` and others read, and their answers.

A request asks one question of a record; later questions of a conversation follow the answers to the earlier ones, in
another file. Its id names the record, the turn and a digest of the record's questions, so that answers cannot be taken
for those of another annotation file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from eagle.conversations import MARK, Conversation, Unusable, read_conversation
from eagle.ge_data.annotations import Record, iter_records
from llava.errors import UserError, reason_of

URL = "/v1/chat/completions"
THOUGHTS = ("reasoning", "reasoning_content")
"""Keys of a message with what a reasoning parser has cut off from the answer."""


@dataclass(frozen=True)
class Answer:
    """``text``: without white space around it; ``cut``: whether it ends at a limit of length, without an end token."""

    text: str
    cut: bool
    model: str


@dataclass(frozen=True)
class Exchange:
    """Requests and what came back. ``answers`` and ``failures`` (the reason) by id; together they are all ``asked``."""

    asked: frozenset[str] = frozenset()
    answers: Mapping[str, Answer] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, requests: Sequence[Path], files: Sequence[Path]) -> Exchange:
        """Reads files of requests, and of answers and errors in any order.

        Raises:
            UserError: a file cannot be read or has another format, an id is there twice, or ids of requests and answers
                differ.
        """
        asked: dict[str, None] = {}
        for path, number, value in _lines(requests):
            name = _id_of(value, path, number)
            if name in asked:
                raise UserError(f"request {name} is there twice", f"{path} line {number}", "give each file once")
            asked[name] = None
        answers: dict[str, Answer] = {}
        failures: dict[str, str] = {}
        for path, number, value in _lines(files):
            name, where = _id_of(value, path, number), f"{path} line {number}"
            if name in answers or name in failures:
                raise UserError(f"request {name} is answered twice", where, "give the answers of one run")
            if name not in asked:
                raise UserError(f"answer to request {name}, which is in none of the request files", where)
            found = parse_answer(value, where)
            if isinstance(found, Answer):
                answers[name] = found
            else:
                failures[name] = found
        if lost := [name for name in asked if name not in answers and name not in failures]:
            raise UserError(
                f"{len(lost)} of {len(asked)} requests have no answer, the first is {lost[0]}",
                ", ".join(map(str, files)) or "no --answers",
                "let the server finish the batch, or also give the file of its errors",
            )
        return cls(frozenset(asked), answers, failures)

    def first_answers(self, names: Sequence[str]) -> list[Answer]:
        """The answers to the first requests of a record, up to one without. ``names``: of all its questions."""
        return [self.answers[name] for name in takewhile(self.answers.__contains__, names)]

    def check_file(self, seen: int, path: Path) -> None:
        """Raises `UserError` unless all requests, ``seen`` of which belong to the annotation file ``path``, do so."""
        if seen != len(self.asked):
            raise UserError(
                f"{len(self.asked) - seen} of {len(self.asked)} requests are not questions of this annotation file",
                path,
                "give the file that the requests were made of, unchanged",
            )


class AskedRecord(NamedTuple):
    """A record, its conversation without answers, and the ids of the requests that ask its questions. ``number``: in
    the annotation file."""

    number: int
    record: Record
    conversation: Conversation
    names: list[str]


@dataclass
class Questions:
    """The questions of an annotation file. ``skipped``: number of records that cannot be used, by reason (a key of
    `eagle.conversations.REASONS`); ``seen``: number of requests of ``exchange`` that ask one of the questions."""

    path: Path
    exchange: Exchange
    skipped: Counter[str] = field(default_factory=Counter)
    seen: int = 0

    def __iter__(self) -> Iterator[AskedRecord]:
        for number, placed in enumerate(iter_records(self.path)):
            try:
                conversation = read_conversation(placed.value, number, keep_answers=False)
            except Unusable as unusable:
                self.skipped[unusable.reason] += 1
                continue
            names = request_ids(conversation, number)
            self.seen += len(self.exchange.asked.intersection(names))
            yield AskedRecord(number, placed.value, conversation, names)
        self.exchange.check_file(self.seen, self.path)


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Raises `UserError` if the file to write is one of those that are read."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UserError("the file to write is one that is read", output, "name another --output")


def request_ids(conversation: Conversation, number: int) -> list[str]:
    """The ids of the requests that ask the questions of a record. ``number``: in the annotation file."""
    about = (conversation.system, [question for question, _ in conversation.turns], conversation.images)
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    return [f"{number}-{turn}-{digest}" for turn in range(len(conversation.turns))]


def messages(conversation: Conversation, answers: Sequence[Answer], pictures: Sequence[str]) -> list[dict[str, Any]]:
    """The messages that ask the question after ``answers``. ``pictures``: their URLs, in the order of the marks."""
    from eagle.families.stock import parts_of  # loads transformers
    from eagle.families.template import mark_first

    left = iter(pictures)
    made: list[dict[str, Any]] = []
    if conversation.system is not None:
        made.append({"role": "system", "content": conversation.system})
    for turn, (question, _) in enumerate(conversation.turns[: len(answers) + 1]):
        if turn:
            made.append({"role": "assistant", "content": answers[turn - 1].text})
        parts = parts_of(mark_first(question))
        content = [
            part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": next(left)}}
            for part in parts
        ]
        is_text = len(parts) == 1 and parts[0]["type"] == "text"
        made.append({"role": "user", "content": parts[0]["text"] if is_text else content})
    return made


def parse_answer(line: Mapping[str, Any], where: str) -> Answer | str:
    """The answer of a line of a batch's output or error file, or why there is none.

    Raises:
        UserError: the line has another format.
    """
    response, error = line.get("response"), line.get("error")
    response = {} if response is None else response
    try:
        body = response.get("body")
        if error is not None or response.get("status_code", 200) != 200 or body is None:
            return _reason(error if error is not None else body) or f"status {response.get('status_code')}"
        (choice,) = body["choices"]
        message, ended = choice["message"], choice["finish_reason"]
        text, model = message["content"], str(body["model"])
        thought = any(message.get(key) for key in THOUGHTS)
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UserError("not the answer of a chat completion with one choice", where) from None
    if ended not in ("stop", "length"):
        return f"ended with finish_reason {ended!r}"
    if thought:
        return "has reasoning beside the answer, which the training templates do not write"
    if not isinstance(text, str):
        return "has no text"
    if MARK in text:
        return f"the answer contains {MARK}"
    return Answer(text.strip(), ended == "length", model)


def _reason(error: Any) -> str:
    """The message of an error, in whatever form servers give it."""
    while isinstance(error, Mapping):
        error = error.get("message") or error.get("error") or error.get("code")
    return reason_of(ValueError(error)) if error else ""


def _lines(paths: Iterable[Path]) -> Iterator[tuple[Path, int, Any]]:
    """Path, number and JSON value of each line that is not blank.

    Raises:
        UserError: a file cannot be read, or a line is not JSON.
    """
    for path in paths:
        number = 0
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield path, number, json.loads(line)
        except OSError as error:
            raise UserError(f"batch file cannot be read ({error.strerror})", path) from None
        except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
            raise UserError(f"batch file is not JSON lines ({error})", f"{path} line {max(number, 1)}") from None


def _id_of(value: Any, path: Path, number: int) -> str:
    name = value.get("custom_id") if isinstance(value, Mapping) else None
    if not isinstance(name, str):
        raise UserError("not a line of a batch file: it has no custom_id", f"{path} line {number}")
    return name

"""Make an annotation file of a server's answers to the requests that `eagle.ge_data.export_questions` has written.

    python -m eagle.ge_data.import_answers --input image.json --requests q1.jsonl --answers a1.jsonl --output own.json

``--answers`` takes output and error files of OpenAI's batch format, as ``vllm run-batch`` writes them. A conversation
ends before its first question without an answer. An answer that reached the limit of length is marked as cut: its end
token is not learnt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle.conversations import ASSISTANT, CUT, MARK, USER, Conversation
from eagle.ge_data.annotations import Record
from eagle.ge_data.batch_file import Answer, Exchange, Questions, check_output
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import atomic_write

SHOWN = 10
"""Failed requests that are listed."""


@dataclass
class Counts:
    """What was written: records, answers, those of them that are cut, and questions that wait for another round.
    ``empty``: records that were left out because all of their answers are empty."""

    records: int = 0
    answers: int = 0
    cut: int = 0
    waiting: int = 0
    empty: int = 0


def answered_record(record: Record, conversation: Conversation, answers: Sequence[Answer]) -> Record:
    """The record with these answers to its first questions."""
    pictures = sum(question.count(MARK) for question, _ in conversation.turns[: len(answers)])
    images = conversation.images[:pictures]
    made: Record = {"id": conversation.id}
    if images:
        made["image"] = images[0] if len(images) == 1 else list(images)
    if conversation.system is not None:
        made["system"] = conversation.system
    if "source" in record:
        made["source"] = record["source"]
    made["model"] = answers[0].model
    made["conversations"] = [
        turn
        for (question, _), answer in zip(conversation.turns, answers, strict=False)
        for turn in (
            {"from": USER, "value": question},
            {"from": ASSISTANT, "value": answer.text, **({CUT: True} if answer.cut else {})},
        )
    ]
    return made


def import_answers(source: Path, exchange: Exchange, output: Path) -> Counts:
    """Writes the records that have an answer.

    Raises:
        UserError: the requests are not those of ``source``, or no record has an answer. ``output`` is left as it was.
    """
    counts, questions = Counts(), Questions(source, exchange)
    with atomic_write(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for _, record, conversation, names in questions:
            answers = exchange.first_answers(names)
            if not any(answer.text for answer in answers):
                counts.empty += bool(answers)
                continue
            file.write(",\n" if counts.records else "[\n")
            file.write(json.dumps(answered_record(record, conversation, answers)))
            counts.records += 1
            counts.answers += len(answers)
            counts.cut += sum(answer.cut for answer in answers)
            if names[len(answers) :] and names[len(answers)] not in exchange.failures:
                counts.waiting += len(names) - len(answers)
        file.write("\n]\n")
        if not counts.records:
            reason = first_failure(exchange) or "all answers are empty"
            raise UserError(f"none of {len(exchange.asked)} requests has an answer", source, reason)
    return counts


def first_failure(exchange: Exchange) -> str | None:
    """The first failed request and why it failed."""
    return next((f"{name}: {reason}" for name, reason in exchange.failures.items()), None)


def list_failures(failures: Mapping[str, str]) -> None:
    """Prints the number of failed requests, and the first of them."""
    if failures:
        print(f"{len(failures):>9}  requests failed; their conversations end before that question:")
    for name in list(failures)[:SHOWN]:
        print(f"           {name}: {failures[name]}")
    if len(failures) > SHOWN:
        print(f"           and {len(failures) - SHOWN} more")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = OneLineParser(prog="python -m eagle.ge_data.import_answers", description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--input", required=True, type=Path, help="annotation file that the requests were made of")
    add("--requests", required=True, type=Path, nargs="+", help="request files of all rounds")
    add("--answers", required=True, type=Path, nargs="+", help="their files of answers and errors")
    add("--output", required=True, type=Path, help="annotation file to write")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parser().parse_args(argv)
    check_output(options.output, [options.input, *options.requests, *options.answers])
    exchange = Exchange.read(options.requests, options.answers)
    counts = import_answers(options.input, exchange, options.output)
    print(f"{counts.records} records with {counts.answers} answers -> {options.output}")
    if counts.cut:
        print(f"{counts.cut:>9}  answers are cut at the limit of length")
    if counts.waiting:
        print(f"{counts.waiting:>9}  later questions have no answer yet; export_questions asks the next ones")
    if counts.empty:
        print(f"{counts.empty:>9}  records left out: all answers are empty")
    list_failures(exchange.failures)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, "the output file is unchanged"))

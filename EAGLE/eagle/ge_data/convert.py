"""Convert an annotation file of ShareGPT, LLaVA or OpenAI: ids as text, turns as `conversations` of human and gpt.

    python -m eagle.ge_data.convert --input llava_v1_5_mix665k.json --output llava_v1_5_mix665k_fixed.json

Everything else in a record stays as it is. The file is streamed, so that memory stays small.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle.conversations import (
    IMAGE_KEYS,
    ROLES,
    TURN_KEYS,
    Unusable,
    check_turn,
    count_unknown_keys,
    image_names,
    speaker_and_content,
    text_of,
    turns_of,
    unknown_keys_note,
)
from eagle.ge_data.annotations import Record, iter_records
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import atomic_write

ADDED = "ids added (the record's number)"
NO_TURNS = "records without a list of turns, which stay as they are"


def fix_record(record: Record, number: int, changes: Counter[str]) -> Record:
    """A record in the common format, with its keys in their old order. ``changes``: counts what was changed.

    An id that is neither text nor an integer stays, so that the allocation reports the record.
    """
    fixed: Record = {}
    turns = turns_of(record)
    for key, value in record.items():
        if key == "id" and value is None:
            changes[ADDED] += 1
            value = str(number)
        elif key == "id" and type(value) is int:
            changes["ids made text"] += 1
            value = str(value)
        if turns is not None and value is turns:
            value = [_fix_turn(turn, changes) for turn in turns]
            if key != TURN_KEYS[0]:
                changes[f"'{key}' renamed '{TURN_KEYS[0]}'"] += 1
                key = TURN_KEYS[0]
        elif turns is not None and key in TURN_KEYS:
            continue  # an empty one beside that which is read
        fixed[key] = value
    if turns is None:
        changes[NO_TURNS] += 1
    elif in_parts := _names_in_parts(record):
        fixed[IMAGE_KEYS[0]] = in_parts
    if "id" not in record:
        changes[ADDED] += 1
        fixed = {"id": str(number), **fixed}
    return fixed


def convert(source: Path, output: Path, unknown: Counter[str] | None = None) -> tuple[int, Counter[str]]:
    """Converts a file; returns the number of records and of each kind of change.

    Args:
        unknown: counts the keys that are not read.

    Raises:
        UserError: ``source`` is missing or damaged, no record has turns (``output`` is left as it was), or both are the
            same file.
    """
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError("input and output are the same file", output)
    changes: Counter[str] = Counter()
    count = 0
    unknown = Counter() if unknown is None else unknown
    with atomic_write(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for count, placed in enumerate(iter_records(source), start=1):
            file.write("[\n" if count == 1 else ",\n")
            count_unknown_keys(placed.value, unknown)
            file.write(json.dumps(fix_record(placed.value, count - 1, changes)))
        file.write("\n]\n" if count else "[]\n")
        if count and changes[NO_TURNS] == count:
            raise UserError("no record has a list of turns", source, f"name it {', '.join(TURN_KEYS)}")
    return count, changes


def _fix_turn(turn: Any, changes: Counter[str]) -> Any:
    """A turn as ``from`` and ``value``. One that cannot be read stays, so that the allocation reports its record."""
    speaker, content = speaker_and_content(turn)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    try:
        check_turn(turn)
        text = text_of(content)
    except Unusable:
        return turn
    if role is None or turn == {**turn, "from": role, "value": text}:
        return turn
    if role != speaker:
        changes[f"'from': '{speaker}' renamed '{role}'"] += 1
    return {"from": role, "value": text} | {
        key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")
    }


def _names_in_parts(record: Record) -> list[str]:
    """The pictures that only the parts of the turns name."""
    if any(record.get(key) for key in IMAGE_KEYS):
        return []
    try:
        return list(image_names(record))
    except Unusable:
        return []


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = OneLineParser(prog="python -m eagle.ge_data.convert", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--input", required=True, type=Path, help="annotation file, a JSON array")
    made.add_argument("--output", required=True, type=Path, help="file to write")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    arguments = parser().parse_args(argv)
    unknown: Counter[str] = Counter()
    count, changes = convert(arguments.input, arguments.output, unknown)
    print(f"{count} records -> {arguments.output}")
    for change, times in changes.most_common():
        print(f"{times:>9}  {change}")
    if (line := unknown_keys_note(unknown)) is not None:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, "the output file is unchanged"))

"""Convert an annotation file of ShareGPT or LLaVA: ids as text, turns as `conversations` of human and gpt.

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

from eagle.conversations import ROLES
from eagle.ge_data.annotations import Record, iter_records
from llava.errors import UserError, run_cli
from llava.files import atomic_write

ADDED = "ids added (the record's number)"


def fix_record(record: Record, number: int, changes: Counter[str]) -> Record:
    """A record in the common format, with its keys in their old order. ``changes``: counts what was changed.

    An id that is neither text nor an integer stays, so that the allocation reports the record.
    """
    fixed: Record = {}
    for key, value in record.items():
        if key == "id" and value is None:
            changes[ADDED] += 1
            value = str(number)
        elif key == "id" and type(value) is int:
            changes["ids made text"] += 1
            value = str(value)
        if key == "items" and "conversations" not in record:
            changes["'items' renamed 'conversations'"] += 1
            key = "conversations"
        if key == "conversations" and isinstance(value, list):
            value = [_fix_turn(turn, changes) for turn in value]
        fixed[key] = value
    if "id" not in record:
        changes[ADDED] += 1
        fixed = {"id": str(number), **fixed}
    return fixed


def convert(source: Path, output: Path) -> tuple[int, Counter[str]]:
    """Converts a file; returns the number of records and of each kind of change.

    Raises:
        UserError: ``source`` is missing or damaged (``output`` is left as it was), or both are the same file.
    """
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError("input and output are the same file", output)
    changes: Counter[str] = Counter()
    count = 0
    with atomic_write(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for count, placed in enumerate(iter_records(source), start=1):
            file.write("[\n" if count == 1 else ",\n")
            file.write(json.dumps(fix_record(placed.value, count - 1, changes)))
        file.write("\n]\n" if count else "[]\n")
    return count, changes


def _fix_turn(turn: Any, changes: Counter[str]) -> Any:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None or role == speaker:
        return turn
    changes[f"'from': '{speaker}' renamed '{role}'"] += 1
    return {**turn, "from": role}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m eagle.ge_data.convert", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--input", required=True, type=Path, help="annotation file, a JSON array")
    made.add_argument("--output", required=True, type=Path, help="file to write")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    arguments = parser().parse_args(argv)
    count, changes = convert(arguments.input, arguments.output)
    print(f"{count} records -> {arguments.output}")
    for change, times in changes.most_common():
        print(f"{times:>9}  {change}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

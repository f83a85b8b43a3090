"""Bring an annotation file of ShareGPT or LLaVA into one shape: text ids, `conversations`, human and gpt.

    python -m eagle.ge_data.convert --input llava_v1_5_mix665k.json --output llava_v1_5_mix665k_fixed.json

Everything else of a row stays as it is. Memory stays small whatever the size of the file.
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
from eagle.ge_data.annotations import Row, iter_rows
from llava.errors import UserError, run_cli
from llava.files import atomic_write

ADDED = "ids added (the row's number)"


def fix_row(row: Row, number: int, changes: Counter[str]) -> Row:
    """A row in the common shape, keys in their old order; counts in ``changes`` what was done to it.

    An id that is no text and no whole number stays, so that the allocation names the row.
    """
    fixed: Row = {}
    for key, value in row.items():
        if key == "id" and value is None:
            changes[ADDED] += 1
            value = str(number)
        elif key == "id" and type(value) is int:
            changes["ids made text"] += 1
            value = str(value)
        if key == "items" and "conversations" not in row:
            changes["'items' renamed 'conversations'"] += 1
            key = "conversations"
        if key == "conversations" and isinstance(value, list):
            value = [_fix_turn(turn, changes) for turn in value]
        fixed[key] = value
    if "id" not in row:
        changes[ADDED] += 1
        fixed = {"id": str(number), **fixed}
    return fixed


def convert(source: Path, output: Path) -> tuple[int, Counter[str]]:
    """Converts a file; returns the number of rows and what was changed how often.

    Raises:
        UserError: ``source`` is missing or broken (``output`` is then as it was), or both are one file.
    """
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError("input and output are one file", output)
    changes: Counter[str] = Counter()
    rows = 0
    with atomic_write(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for rows, placed in enumerate(iter_rows(source), start=1):
            file.write("[\n" if rows == 1 else ",\n")
            file.write(json.dumps(fix_row(placed.value, rows - 1, changes)))
        file.write("\n]\n" if rows else "[]\n")
    return rows, changes


def _fix_turn(turn: Any, changes: Counter[str]) -> Any:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None or role == speaker:
        return turn
    changes[f"'from': '{speaker}' renamed '{role}'"] += 1
    return {**turn, "from": role}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m eagle.ge_data.convert", description=__doc__.splitlines()[0])
    made.add_argument("--input", required=True, type=Path, help="annotation file, a JSON array")
    made.add_argument("--output", required=True, type=Path, help="file to write")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = parser().parse_args(argv)
    rows, changes = convert(arguments.input, arguments.output)
    print(f"{rows} rows -> {arguments.output}")
    for change, count in changes.most_common():
        print(f"{count:>9}  {change}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

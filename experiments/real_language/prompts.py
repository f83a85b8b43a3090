"""The training prompts as an annotation file of the pipeline; the base model answers them itself.

    python -m experiments.real_language.prompts --out outputs/smollm2/text.json

Both prompt files, train.jsonl and heldout.jsonl, are question files as for `msd bench`, written for this experiment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava.arguments import OneLineParser
from llava.errors import run_cli
from llava.files import write_json

TRAIN, HELD_OUT = (Path(__file__).parent / name for name in ("train.jsonl", "heldout.jsonl"))


def main() -> None:
    """Writes one conversation for each training prompt, without its answer."""
    parser = OneLineParser(
        prog="python -m experiments.real_language.prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the annotation file")
    options = parser.parse_args()
    from eagle.questions import read_questions  # imports torch

    records = [
        {"id": each.id, "conversations": [{"from": "human", "value": each.question}]} for each in read_questions(TRAIN)
    ]
    write_json(options.out, records)
    print(f"{options.out}: {len(records)} prompts")


if __name__ == "__main__":
    sys.exit(run_cli(main))

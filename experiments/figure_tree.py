"""docs/method-tree.png: a draft tree that the engine grew, verified and accepted while it answered a held-out question.

    python -m experiments.figure_tree                                # pocket LLaVA, question h0000
    python -m experiments.figure_tree --question h0007 --cycle 3 --tree 4/3/8 --out tree.png

Without ``--cycle`` it is a typical one: of the cycles whose number of new tokens is nearest to the answer's mean, τ,
the one with most branches. Greedy, in float32, so the same weights give the same picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eagle.arguments import tree_limits
from experiments.common import REPO
from llava.arguments import OneLineParser
from llava.errors import run_cli

OUT = REPO / "docs" / "method-tree.png"


def parse_args() -> argparse.Namespace:
    made = OneLineParser(
        prog="python -m experiments.figure_tree", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--question", default="h0000", metavar="ID", help="of pocket/data/heldout.jsonl (default: h0000)")
    add("--cycle", type=int, help="from 1 (default: a typical one)")
    add("--tree", type=tree_limits, metavar="D/K/N", help="default: 6/3/12")
    add("--out", type=Path, default=OUT, help="the PNG (default: docs/method-tree.png)")
    return made.parse_args()


def main() -> None:
    """Answers the question and draws one cycle."""
    options = parse_args()
    from experiments.figure_tree_run import run  # imports torch

    run(options)


if __name__ == "__main__":
    sys.exit(run_cli(main))

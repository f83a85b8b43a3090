"""What each optimization of a decoding cycle gains: the engine against itself with one of them turned off.

    python -m experiments.ablations                                  # the pocket LLaVA pair
    python -m experiments.ablations --rounds 4 --questions 3 --max-new-tokens 64

All ways answer the same questions in interleaved rounds with the same fixed tree, and give the same tokens. The table
has the median time of a cycle, and of the prefill, as it is and without each optimization.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eagle.arguments import positive
from experiments.common import parser
from llava.errors import run_cli


def parse_args() -> argparse.Namespace:
    made = parser("experiments.ablations", __doc__)
    add = made.add_argument
    add("--base-model", default="pocket/llava")
    add("--msd-model", default="pocket/llava-msd")
    add("--data", type=Path, default=Path("pocket/data/heldout.jsonl"))
    add("--questions", type=positive, default=4)
    add("--max-new-tokens", type=positive, default=96)
    add("--rounds", type=positive, default=9)
    return made.parse_args()


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    options = parse_args()
    from experiments.ablations_run import run  # imports torch

    run(options)


if __name__ == "__main__":
    sys.exit(run_cli(main))

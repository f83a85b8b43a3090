"""Speed and memory of the training loss: masked rows through lm_head in chunks (ours) against all logits at once.

    python -m experiments.training_cost --data pocket/build/draft-llava
    python -m experiments.training_cost --vocab 152064 --positions 2048 --hidden 3584 --rounds 3 --steps 1

The first form trains the pocket draft on stored hidden states (of pocket/recipe/train_draft.sh). The second runs loss
and gradient of a random head alone, on one sample with 30 % of its positions in an answer. Both ways take turns in one
process. Peak memory is that of two steps in a separate process: resident memory, or allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eagle.arguments import positive
from experiments.common import parser
from llava.errors import run_cli


def parse_args() -> argparse.Namespace:
    made = parser("experiments.training_cost", __doc__)
    add = made.add_argument
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="FOLDER", help="hidden states in FOLDER/hidden_t and hidden_v")
    what.add_argument("--vocab", type=positive, help="rows of a random head: 152064 is Qwen2-VL's, 32000 LLaVA-1.5's")
    add("--base", default="pocket/llava", help="with --data: base model (default %(default)s)")
    add("--config", default="pocket_llava_config.json", help="with --data: training config (default %(default)s)")
    add("--deepspeed-config", default="pocket_ds_config.json", help="with --data (default %(default)s)")
    add("--positions", type=positive, default=2048, help="with --vocab: of the sample (default %(default)s)")
    add("--hidden", type=positive, default=3584, help="with --vocab: hidden size (default %(default)s)")
    add("--rounds", type=positive, default=5, help="turns of each way (default %(default)s)")
    add("--steps", type=positive, default=4, help="steps of a turn (default %(default)s)")
    add("--worker", help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    """Throughput of both ways in turn, then the peak memory of each alone."""
    options = parse_args()
    from experiments.training_cost_run import run  # imports torch

    run(options)


if __name__ == "__main__":
    sys.exit(run_cli(main))

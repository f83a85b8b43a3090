"""What to run first on a GPU: placement, identity of answers, costs, compilations, launches and speed, in one report.

    python -m benchmarks.gpu_check                      # at most ten minutes; needs no network and no download
    python -m benchmarks.gpu_check --base liuhaotian/llava-v1.5-7b --draft lucylyn/MSD-LLaVA1.5-7B
    python -m benchmarks.gpu_check --quick --device cpu # one minute, to see that everything works

Costs come from random weights in the true shape of LLaVA-1.5-7B (``--shape``), answers from the pocket pairs and, if
given, from a real pair. Needs only torch, transformers, safetensors and the packages of plain decoding. Each part is
measured by itself; a part that fails is reported with its error, and the others still run.

Writes ``gpu_check.json`` and ``gpu_check.html`` to ``--out``. Attach both to an issue.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli

SHAPES = ("7b", "tiny")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", help="default: the accelerator, else the CPU")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="default float16, on a CPU float32")
    add("--shape", choices=SHAPES, help="of the random weights (default 7b, with --quick tiny)")
    add("--base", help="a real base model, folder or hub name")
    add("--draft", help="its draft")
    add("--questions", type=int, default=20, help="of each pair (default %(default)s)")
    add("--new-tokens", type=int, default=128, help="of each answer (default %(default)s)")
    add("--minutes", type=float, default=10, help="no part starts later than this (default %(default)s)")
    add("--quick", action="store_true", help="tiny shape, two questions, short answers")
    add("--out", type=Path, default=Path("outputs/gpu_check"), help="default: %(default)s")
    arguments = parser.parse_args()
    if (arguments.base is None) != (arguments.draft is None):
        raise UserError("--base and --draft belong together", fix="give both, or neither")
    if arguments.quick:
        arguments.questions, arguments.new_tokens = 2, 16
    arguments.shape = arguments.shape or ("tiny" if arguments.quick else "7b")
    return arguments


def main() -> int:
    """Runs all parts within the time and writes the report. Exit status 1 if a part failed."""
    arguments = parse_arguments()
    from benchmarks.gpu_check_run import run_parts  # imports torch

    return run_parts(arguments)


if __name__ == "__main__":
    sys.exit(run_cli(main))

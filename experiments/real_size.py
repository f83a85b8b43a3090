"""Costs of decoding at the real size on random weights, and the speed-up to expect from published acceptance lengths.

    python -m experiments.real_size                     # LLaVA-1.5-7B's shape, as many layers as memory holds
    python -m experiments.real_size --model 13b
    python -m experiments.real_size --simulate-only     # a GPU by its data sheet; nothing is measured

Random weights cost the same as trained ones and accept nothing, so acceptance comes from `published.json`. If memory
does not hold all layers, the time of a layer comes from the times at two depths, and the figures are scaled to all
layers; the report says so.

A cycle gives τ tokens and takes ``T_draft + T_verify(n)``; plain decoding takes ``T(1)`` per token::

    speed-up <= tau * T(1) / (T_draft + T_verify(n))

This is a bound: a request also reads its prompt, and a cycle also selects, accepts and commits. On a GPU a forward of
``n`` rows takes the longer of reading and computing (roofline), in 16 bit::

    T(n) = max(bytes / bandwidth, flop(n) / arithmetic) + layers * overhead
    bytes   = 2 * (layers * layer_parameters + head_parameters) + 4 * layers * hidden * context
    flop(n) = 2 * n * (layers * layer_parameters + head_parameters) + 4 * n * layers * hidden * context
"""

from __future__ import annotations

import argparse
import sys

from experiments.common import parser
from llava.errors import run_cli

MODELS = ("7b", "13b", "quick")


def parse_args() -> argparse.Namespace:
    made = parser("experiments.real_size", __doc__)
    add = made.add_argument
    add("--model", choices=MODELS, default="7b", help="whose shape; 'quick' is a tiny one (default: 7b)")
    add("--device", default="cpu", help="where costs are measured (default: cpu)")
    add("--simulate-only", action="store_true", help="measure nothing")
    add("--bandwidth", type=float, default=2.0, help="of the simulated GPU, terabytes a second (default: 2.0)")
    add("--arithmetic", type=float, default=312.0, help="of the simulated GPU, 16-bit TFLOP a second (default: 312)")
    return made.parse_args()


def main() -> None:
    """Measures and simulates; prints tables, writes JSON if asked."""
    options = parse_args()
    from experiments.real_size_run import run  # imports torch

    run(options)


if __name__ == "__main__":
    sys.exit(run_cli(main))

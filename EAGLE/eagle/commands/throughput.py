"""Measure tokens per second at several batch sizes, with MSD and plainly: where does speculation stop paying?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from eagle.arguments import add_data_options, add_length_option, add_model_options, load_model, positive
from eagle.benchmark import Contestant, interleave, versions, with_engine
from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.provenance import hardware
from eagle.questions import Group, read_questions
from llava.errors import UserError
from llava.files import atomic_write

SIZES = (1, 2, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd throughput`."""
    add_model_options(parser)
    add_data_options(parser)
    add_length_option(parser, 128)
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=list(SIZES), help="(default: 1 2 4 8)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the report here as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Greedy answers to the same questions at every batch size, MSD and plain decoding in turn."""
    questions = read_questions(arguments.data, arguments.limit)
    if len(questions) < max(arguments.batch_sizes):
        raise UserError(f"{len(questions)} questions are fewer than a batch of {max(arguments.batch_sizes)}")
    model = load_model(arguments)
    rows = []
    for size in arguments.batch_sizes:
        starts = range(0, len(questions) - size + 1, size)
        groups = [Group(tuple(questions[start : start + size])) for start in starts]
        settings = {"max_new_tokens": arguments.max_new_tokens, "temperature": 0.0}
        msd = Contestant("MSD", with_engine(model, True, settings))
        plain = Contestant("plain", with_engine(model, False, settings))
        progress = tqdm(total=len(groups), desc=f"batches of {size}", file=sys.stderr)
        for _ in interleave([msd, plain], groups, warm_up=1):
            progress.update()
        progress.close()
        rows.append(row_of(model, size, msd.total, plain.total))
    Console().print(table_of(rows))
    if arguments.out:
        report = {"rows": rows, "versions": versions(), "hardware": hardware(model.device), "dtype": str(model.dtype)}
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def row_of(model: MSDModel, size: int, msd: Stats, plain: Stats) -> dict[str, Any]:
    """What was measured at one batch size."""
    return {
        "batch": size,
        "tree": asdict(model.tree_for(size)),
        "plain": plain.tokens_per_second,
        "msd": msd.tokens_per_second,
        "speedup": msd.tokens_per_second / plain.tokens_per_second,
        "tau": msd.tau,
    }


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a batch size."""
    table = Table(title="tokens per second of a whole batch, greedy")
    for column in ("batch", "nodes a sequence", "τ", "plain", "MSD", "speed-up"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch"]), str(row["tree"]["total_tokens"]), f"{row['tau']:.2f}", f"{row['plain']:.0f}",
            f"{row['msd']:.0f}", f"{row['speedup']:.2f}x",
        )  # fmt: skip
    return table

"""Measure tokens per second at several batch sizes, with MSD and with plain decoding."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from eagle.arguments import add_data_options, add_length_option, add_model_options, add_report_option, positive
from eagle.commands.output import console
from eagle.questions import Group, read_questions
from llava.errors import UserError
from llava.files import check_writable, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from eagle.decode.msd import MSDModel
    from eagle.decode.stats import Stats

SIZES = (1, 2, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd throughput`."""
    add_model_options(parser)
    add_data_options(parser)
    add_length_option(parser, 128)
    parser.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        default=list(SIZES),
        metavar="B",
        help="batch sizes to measure (default: 1 2 4 8)",
    )
    add_report_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answers the same questions greedily at every batch size, with MSD and plain decoding in turn."""
    if arguments.out:
        check_writable(arguments.out)
    from eagle.benchmark import Contestant, interleave_with_bar, with_engine
    from eagle.decode.compiled.engine import LARGEST_BATCH
    from eagle.loading import load_model
    from eagle.provenance import record

    questions = read_questions(arguments.data, arguments.limit)
    if len(questions) < max(arguments.batch_sizes):
        raise UserError(f"{len(questions)} questions are fewer than a batch of {max(arguments.batch_sizes)}")
    model = load_model(arguments)
    if sizes := [size for size in arguments.batch_sizes if size <= LARGEST_BATCH]:
        model.warm_up(batch_sizes=sizes)
    rows = []
    for size in arguments.batch_sizes:
        starts = range(0, len(questions) - size + 1, size)
        groups = [Group(tuple(questions[start : start + size])) for start in starts]
        settings = {"max_new_tokens": arguments.max_new_tokens, "temperature": 0.0}
        msd = Contestant("MSD", with_engine(model, True, settings))
        plain = Contestant("plain", with_engine(model, False, settings))
        for _ in interleave_with_bar([msd, plain], [[group] for group in groups], 1, f"batches of {size}", "batch"):
            pass
        rows.append(row_of(model, size, msd.total, plain.total))
    console().print(table_of(rows))
    if arguments.out:
        write_json(arguments.out, {"rows": rows, "dtype": str(model.dtype), **record(model.device)})
    return 0


def row_of(model: MSDModel, size: int, msd: Stats, plain: Stats) -> dict[str, Any]:
    """The measurements at one batch size."""
    return {
        "batch": size,
        "tree": asdict(model.tree_for(size)),
        "plain": plain.tokens_per_second,
        "msd": msd.tokens_per_second,
        "speedup": msd.tokens_per_second / plain.tokens_per_second,
        "tau": msd.tau,
    }


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """One line for each batch size."""
    from rich.table import Table

    table = Table(title="tokens per second of a whole batch, greedy")
    for column in ("batch", "nodes a sequence", "τ", "plain", "MSD", "speed-up"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch"]), str(row["tree"]["total_tokens"]), f"{row['tau']:.2f}", f"{row['plain']:.0f}",
            f"{row['msd']:.0f}", f"{row['speedup']:.2f}x",
        )  # fmt: skip
    return table

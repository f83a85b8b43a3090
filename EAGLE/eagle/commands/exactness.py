"""Check that sampled answers follow the base model's distribution (chi-square test over many draws)."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from eagle.arguments import add_data_options, add_model_options, add_report_option, positive
from eagle.commands.output import console
from eagle.questions import read_questions
from llava.files import write_json
from llava.inputs import seed_option

if TYPE_CHECKING:
    from rich.table import Table

    from eagle.exactness import Fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd exactness`."""
    add_model_options(parser, dtype="float32")
    add_data_options(parser)
    parser.add_argument(
        "--draws", type=positive, default=50_000, metavar="N", help="for each setting and question (default: 50000)"
    )
    parser.add_argument("--seed", type=seed_option, default=0, help="of the draws (default: 0)")
    add_report_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; exit status 1 if a comparison fails."""
    from tqdm import tqdm

    from eagle.exactness import check_prompt, significant
    from eagle.loading import load_model

    questions = read_questions(arguments.data, arguments.limit)
    model = load_model(arguments)
    fits: list[Fit] = []
    for question in tqdm(questions, desc="exactness", unit="question", file=sys.stderr):
        fits += check_prompt(model, question.inputs(model.target), model.tree, arguments.draws, arguments.seed)
    console().print(table_of(fits))
    if arguments.out:
        write_json(arguments.out, [asdict(fit) for fit in fits])
    failed = significant(fits)
    print(f"{len(failed)}/{len(fits)} comparisons fail at level 0.001 for all together")
    return 1 if failed else 0


def table_of(fits: list[Fit]) -> Table:
    """One line for each setting and place: the smallest p-value and the largest distance over all questions."""
    from rich.table import Table

    table = Table(
        "setting", "token", "draws", "total variation", "smallest p", title="sampled tokens against the base model"
    )
    for key in dict.fromkeys((fit.setting, fit.where) for fit in fits):
        group = [fit for fit in fits if (fit.setting, fit.where) == key]
        worst, least = max(fit.variation for fit in group), min(fit.p for fit in group)
        table.add_row(*key, f"{sum(fit.draws for fit in group):,}", f"{worst:.4f}", f"{least:.3f}")
    return table

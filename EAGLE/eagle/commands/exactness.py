"""Check that sampled answers have exactly the target's distribution: chi-square over many draws."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from eagle.arguments import add_data_options, add_model_options, load_model, positive
from eagle.exactness import Fit, check_prompt, significant
from eagle.questions import read_questions
from llava.files import atomic_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd exactness`."""
    add_model_options(parser, dtype="float32")
    add_data_options(parser)
    parser.add_argument("--draws", type=positive, default=50_000, help="for each setting and question (default: 50000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the comparisons here as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; exit status 1 if a comparison fails."""
    questions = read_questions(arguments.data, arguments.limit)
    model = load_model(arguments)
    fits: list[Fit] = []
    for question in tqdm(questions, desc="exactness", unit="question", file=sys.stderr):
        fits += check_prompt(model, question.inputs(model.target), model.tree, arguments.draws, arguments.seed)
    Console().print(table_of(fits))
    if arguments.out:
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(json.dumps([asdict(fit) for fit in fits], indent=1) + "\n", encoding="utf-8")
    failed = significant(fits)
    print(f"{len(failed)}/{len(fits)} comparisons fail at level 0.001 for all together")
    return 1 if failed else 0


def table_of(fits: list[Fit]) -> Table:
    """One line for each setting and place: the least p-value and the largest distance of all questions."""
    table = Table("setting", "token", "draws", "total variation", "least p", title="sampled tokens against the target")
    for key in dict.fromkeys((fit.setting, fit.where) for fit in fits):
        group = [fit for fit in fits if (fit.setting, fit.where) == key]
        worst, least = max(fit.variation for fit in group), min(fit.p for fit in group)
        table.add_row(*key, f"{sum(fit.draws for fit in group):,}", f"{worst:.4f}", f"{least:.3f}")
    return table

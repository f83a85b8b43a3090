"""Compares an evaluation of the base model alone with one that used MSD: scores, answers, τ and speed.

    python -m lmms_eval_msd.compare --base DIR --msd DIR --out DIR

Both are the `--output_path` of lmms-eval runs with `--log_samples`; the newest run below each counts. Writes
`compare.json` and `compare.png` and prints a table. The exit status is not 0 if results are missing, or with
`--require-equal` if an answer differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import atomic_write
from lmms_eval_msd.report import Run, differences, load_run, speedup


def compare(base: Run, msd: Run) -> dict[str, Any]:
    """The comparison as plain data.

    Raises:
        UserError: the runs have different tasks or different questions.
    """
    if base.scores.keys() != msd.scores.keys():
        tasks = [", ".join(sorted(run.scores)) for run in (base, msd)]
        raise UserError(f"the runs have different tasks: {tasks[0]} and {tasks[1]}")
    rows = {}
    for task in sorted(base.scores):
        mine, other = base.answers[task], msd.answers[task]
        if mine.keys() != other.keys():
            raise UserError(f"the runs have different questions of {task}", fix="use the same --limit and --offset")
        plain, fast = base.decoding["tasks"][task], msd.decoding["tasks"][task]
        rows[task] = {
            "metrics": {
                name: {"base": value, "msd": msd.scores[task].get(name)} for name, value in base.scores[task].items()
            },
            "answers": len(mine),
            "answers_equal": sum(mine[key] == other[key] for key in mine),
            "tau": fast["tau"],
            "tokens_per_second": {"base": plain["tokens_per_second"], "msd": fast["tokens_per_second"]},
            "seconds": {"base": plain["seconds"], "msd": fast["seconds"]},
            "speedup": speedup(fast, plain),
            "histogram": fast["histogram"],
            "acceptance_by_position": fast["acceptance_by_position"],
        }
    setting = {
        key: msd.decoding[key] for key in ("base", "draft", "dtype", "tree", "processes", "hardware", "versions")
    }
    apart = differences(base.decoding, msd.decoding)
    return {"tasks": rows, **setting, "differences": apart, "results": {"base": str(base.path), "msd": str(msd.path)}}


def table(comparison: Mapping[str, Any]) -> Table:
    """The comparison for the screen; one line for each metric."""
    result = Table(title=f"base and MSD, {comparison['dtype']}, {comparison['hardware']}", title_justify="left")
    for name in ("task", "metric"):
        result.add_column(name)
    for name in ("base", "MSD", "equal answers", "τ", "tokens/s base", "tokens/s MSD", "speed-up"):
        result.add_column(name, justify="right")
    for task, row in comparison["tasks"].items():
        speed = row["tokens_per_second"]
        decoding = [
            f"{row['answers_equal']}/{row['answers']}",
            f"{row['tau']:.2f}",
            f"{speed['base']:.1f}",
            f"{speed['msd']:.1f}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        ]
        metrics = row["metrics"] or {"-": {"base": None, "msd": None}}
        for name, values in metrics.items():
            scores = ["-" if values[run] is None else f"{values[run]:.4g}" for run in ("base", "msd")]
            result.add_row(task, name, *scores, *decoding)
            task, decoding = "", [""] * len(decoding)
    return result


def draw(comparison: Mapping[str, Any], path: Path) -> None:
    """Bar chart of tokens per second of each task, with the speed-up above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: dict[str, Any] = comparison["tasks"]
    figure = Figure(figsize=(max(4.0, 1.0 + 1.6 * len(rows)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for shift, run, label, colour in ((-0.2, "base", "base alone", "#9aa5b1"), (0.2, "msd", "MSD", "#2f6fb0")):
        speeds = [row["tokens_per_second"][run] for row in rows.values()]
        bars = axes.bar([place + shift for place in range(len(rows))], speeds, width=0.4, label=label, color=colour)
        if run == "msd":
            texts = ["" if row["speedup"] is None else f"{row['speedup']:.2f}x" for row in rows.values()]
            axes.bar_label(bars, texts, padding=2)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel("tokens per second")
    axes.set_title(str(comparison["hardware"]), fontsize="small")
    axes.margins(y=0.15)
    axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = OneLineParser(prog="python -m lmms_eval_msd.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="--output_path of the run without --use_msd")
    parser.add_argument("--msd", type=Path, required=True, help="--output_path of the run with --use_msd")
    parser.add_argument("--out", type=Path, required=True, help="folder for compare.json and compare.png")
    parser.add_argument("--require-equal", action="store_true", help="end with status 1 if an answer differs")
    args = parser.parse_args(argv)
    comparison = compare(load_run(args.base, use_msd=False), load_run(args.msd, use_msd=True))
    with atomic_write(args.out / "compare.json") as temporary:
        temporary.write_text(json.dumps(comparison, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(comparison, args.out / "compare.png")
    console = Console()
    console.print(table(comparison))
    for name, (plain, fast) in comparison["differences"].items():
        console.print(f"the runs differ in {name}: base {plain}, MSD {fast}; their speeds are not quite comparable")
    differ = any(row["answers_equal"] < row["answers"] for row in comparison["tasks"].values())
    return 1 if differ and args.require_equal else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Compares an evaluation of the base model alone with one that used MSD: scores, answers, τ and speed.

    python -m lmms_eval_msd.compare --base DIR --msd DIR --out DIR

Both are the `--output_path` of lmms-eval runs with `--log_samples`; the newest run below each counts. Writes
`compare.json` and `compare.png` and prints a table. Ends with a status other than 0 where results are absent, or with
`--require-equal` where an answer differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llava.errors import UserError, run_cli
from llava.files import atomic_write, read_json

RESULTS = "_results.json"


@dataclass(frozen=True)
class Run:
    """One evaluation. ``answers``: task -> (document, number among its repeats) -> text."""

    path: Path
    scores: dict[str, dict[str, float]]
    answers: dict[str, dict[tuple[Any, int], str]]
    decoding: dict[str, Any]


def load_run(folder: Path, use_msd: bool) -> Run:
    """Reads the newest run below ``folder``.

    Raises:
        UserError: there is none, it failed half-way, or it is not of the wanted kind.
    """
    files = sorted(folder.rglob(f"*{RESULTS}"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    if not files:
        raise UserError("no results of lmms-eval", folder, "did the evaluation fail?")
    results = read_json(files[-1], "results file")
    decoding = results.get("msd")
    if not decoding:
        raise UserError("results without decoding statistics", files[-1], "evaluate with llava_msd or qwen2_vl_msd")
    if decoding["use_msd"] != use_msd:
        kind = "speculative" if decoding["use_msd"] else "plain"
        raise UserError(f"these are results of {kind} decoding", files[-1], "exchange --base and --msd?")
    tasks = {task: _scores(values) for task, values in results["results"].items() if task in decoding["tasks"]}
    if not tasks:
        raise UserError("results without a task", files[-1], "did the evaluation fail?")
    stem = files[-1].name.removesuffix(RESULTS)
    answers = {task: _answers(files[-1].with_name(f"{stem}_samples_{task}.jsonl")) for task in tasks}
    return Run(files[-1], tasks, answers, decoding)


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one task, without filter names and without standard errors."""
    named = {key.split(",")[0]: value for key, value in values.items() if "," in key}
    numbers = {name: value for name, value in named.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if "stderr" not in name}


def _answers(path: Path) -> dict[tuple[Any, int], str]:
    if not path.is_file():
        raise UserError("answers are missing", path, "evaluate with --log_samples")
    answers = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        given = sample["filtered_resps"]
        for number, text in enumerate(given if isinstance(given, list) else [given]):
            answers[sample["doc_id"], number] = str(text)
    return answers


def compare(base: Run, msd: Run) -> dict[str, Any]:
    """The comparison as plain data.

    Raises:
        UserError: the runs have not the same tasks, or not the same questions.
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
            "speedup": _ratio(fast["tokens_per_second"], plain["tokens_per_second"]),
            "histogram": fast["histogram"],
            "acceptance_by_position": fast["acceptance_by_position"],
        }
    setting = {
        key: msd.decoding[key] for key in ("base", "draft", "dtype", "tree", "processes", "hardware", "versions")
    }
    return {"tasks": rows, **setting, "results": {"base": str(base.path), "msd": str(msd.path)}}


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference else None


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
    parser = argparse.ArgumentParser(prog="python -m lmms_eval_msd.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="--output_path of the run without --use_msd")
    parser.add_argument("--msd", type=Path, required=True, help="--output_path of the run with --use_msd")
    parser.add_argument("--out", type=Path, required=True, help="folder for compare.json and compare.png")
    parser.add_argument("--require-equal", action="store_true", help="end with status 1 if an answer differs")
    args = parser.parse_args(argv)
    comparison = compare(load_run(args.base, use_msd=False), load_run(args.msd, use_msd=True))
    with atomic_write(args.out / "compare.json") as temporary:
        temporary.write_text(json.dumps(comparison, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(comparison, args.out / "compare.png")
    Console().print(table(comparison))
    differ = any(row["answers_equal"] < row["answers"] for row in comparison["tasks"].values())
    return 1 if differ and args.require_equal else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

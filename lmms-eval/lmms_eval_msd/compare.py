"""Compares an evaluation of the base model alone with those that used MSD: scores, answers, τ, acceptance and speed.

    python -m lmms_eval_msd.compare --base DIR --msd DIR [DIR ...] --out DIR

Each is the `--output_path` of an lmms-eval run with `--log_samples`; the newest run below it counts. Several `--msd`
are of different drafts. Writes `compare.md`, `compare.json` and `compare.png` and prints the page's tables. The exit
status is not 0 if results are missing, or with `--require-equal` if an answer differs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import atomic_write, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

    from lmms_eval_msd.report import Run

ALONE = "the base run; other plain ways were not measured"
"""The baseline of a run that was given none."""
COLOURS = ("#9aa5b1", "#2f6fb0", "#d98032", "#4b9560", "#8a63a8")
"""Of the base and of each draft in the chart."""
POSITIONS = 8
"""Positions in a table on the screen; the page has all of them."""


class Table(NamedTuple):
    """A table of the page; ``texts`` columns are on the left, numbers follow."""

    title: str
    header: list[str]
    rows: list[list[str]]
    texts: int = 2


def compare(base: Run, msd: Run) -> dict[str, Any]:
    """The comparison as plain data.

    Raises:
        UserError: the runs have different tasks or different questions.
    """
    from eagle.benchmark import ratio
    from eagle.provenance import partly_trained
    from lmms_eval_msd.report import differences

    if base.scores.keys() != msd.scores.keys():
        tasks = [", ".join(sorted(run.scores)) for run in (base, msd)]
        raise UserError(f"the runs have different tasks: {tasks[0]} and {tasks[1]}")
    baseline, named = msd.decoding.get("baseline"), msd.decoding.get("baseline") or base.decoding.get("baseline") or {}
    unfair = bool(msd.decoding.get("compile")) and not base.decoding.get("compile")
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
            "speedup": fast["speedup"]
            if baseline
            else None
            if unfair
            else ratio(fast["tokens_per_second"], plain["tokens_per_second"]),
            "paired_speedup": fast.get("paired_speedup"),
            "after_first_token": fast.get("after_first_token"),
            "histogram": fast["histogram"],
            "acceptance_by_position": fast["acceptance_by_position"],
        }
    setting = {
        key: msd.decoding[key] for key in ("base", "draft", "dtype", "tree", "processes", "hardware", "versions")
    }
    apart = differences(base.decoding, msd.decoding)
    results = {"base": str(base.path), "msd": str(msd.path)}
    return {
        "tasks": rows, **setting, "baseline": named.get("name"),
        "draft_note": partly_trained(msd.decoding["draft"]), "differences": apart, "results": results,
    }  # fmt: skip


def names(comparisons: Sequence[Any]) -> list[str]:
    """What the runs with a draft are called."""
    return ["MSD"] if len(comparisons) == 1 else [f"MSD {number}" for number in range(1, len(comparisons) + 1)]


def tables(comparisons: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Speed, scores and acceptance of the base and of each draft.

    Args:
        comparisons: `compare` of the same base with each draft.
    """
    from eagle.report.bench import mean_text

    called = names(comparisons)
    speed, scores, accepted, faster = [], [], [], []
    for task, base in comparisons[0]["tasks"].items():
        rows = [comparison["tasks"][task] for comparison in comparisons]
        plain = base["tokens_per_second"]["base"]
        own = "" if any(one["baseline"] for one in comparisons) else _number(1.0 if plain else None, ".2f", "x")
        speed.append([task, "base", "", _number(plain, ".1f"), own, "1.00"])
        for name, row in zip(called, rows, strict=True):
            equal = f"{row['answers_equal']}/{row['answers']}"
            times = _number(row["speedup"], ".2f", "x")
            speed.append(["", name, equal, f"{row['tokens_per_second']['msd']:.1f}", times, f"{row['tau']:.2f}"])
            both = [part for part in (row, row["after_first_token"]) if part and part["paired_speedup"]]
            if len(both) == 2:
                faster.append([task, name])
                for part in both:
                    faster[-1] += [f"{part['speedup']:.2f}x", mean_text(part["paired_speedup"])]
            shares = [f"{share:.2f}" for share in row["acceptance_by_position"]]
            accepted.append([task if name == called[0] else "", name, *shares])
        for metric, values in base["metrics"].items():
            others = [row["metrics"].get(metric, {}).get("msd") for row in rows]
            first = task if metric == next(iter(base["metrics"])) else ""
            scores.append([first, metric, *(_number(value, ".4g") for value in (values["base"], *others))])
    deepest = max((len(row) - 2 for row in accepted), default=0)
    accepted = [row + [""] * (deepest + 2 - len(row)) for row in accepted]
    conventions = ["task", "run", "totals", "mean [95 %]", "after first", "mean [95 %]"]
    both_kinds = Table("Speed-up: totals and mean of requests, whole and after the first token", conventions, faster)
    return [
        Table("Speed", ["task", "run", "equal answers", "tokens/s", "speed-up", "τ"], speed),
        *([both_kinds] if faster else []),
        Table("Scores", ["task", "metric", "base", *called], scores),
        Table("Accepted drafted tokens by position", ["task", "run", *map(str, range(1, deepest + 1))], accepted),
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def runs(comparisons: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What is compared: name and value of each line."""
    first = comparisons[0]
    drafts = [
        (name, f"{one['draft']} ({one['draft_note']})" if one["draft_note"] else str(one["draft"]))
        for name, one in zip(names(comparisons), comparisons, strict=True)
    ]
    machine = f"{first['hardware']}, {first['dtype']}, {first['processes']} process(es)"
    over = ", ".join(dict.fromkeys(one["baseline"] or ALONE for one in comparisons))
    return [("base", str(first["base"])), *drafts, ("machine", machine), ("speed-up", f"over {over}")]


def warnings(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each setting in which a run with a draft differs from the base's."""
    return [
        f"the runs differ in {setting}: base {plain}, {name} {fast}; their speeds are not quite comparable"
        for name, comparison in zip(names(comparisons), comparisons, strict=True)
        for setting, (plain, fast) in comparison["differences"].items()
    ]


def show(comparisons: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The tables on the screen, at most 80 columns wide."""
    from rich import box
    from rich.table import Table as Screen

    for name, value in runs(comparisons):
        console.print(f"{name:<8} {value}", soft_wrap=True, highlight=False, markup=False)
    for table in tables(comparisons):
        screen = Screen(title=table.title, title_justify="left", box=box.SIMPLE, collapse_padding=True)
        for place, name in enumerate(table.header[: table.texts + POSITIONS]):
            screen.add_column(name, justify="left" if place < table.texts else "right", overflow="fold")
        for row in table.rows:
            screen.add_row(*row[: table.texts + POSITIONS])
        console.print(screen)
    for line in warnings(comparisons):
        console.print(line, highlight=False, markup=False)


PAGE = """# Base model and MSD

{runs}

{tables}

![tokens per second](compare.png)

Equal answers: answers that are the base's own, letter by letter. Tokens/s: new tokens by the time of decoding, without
reading data and scoring; base and MSD ran one after the other. Speed-up: of totals. τ: new tokens for each
verification. Accepted: share of verifications that accepted the drafted token at this position and all before it.
Versions: {versions}.
{warnings}"""


def page(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as a page in Markdown."""
    parts = []
    for table in tables(comparisons):
        marks = ["---"] * table.texts + ["---:"] * (len(table.header) - table.texts)
        lines = [f"| {' | '.join(cells)} |" for cells in (table.header, marks, *table.rows)]
        parts.append("\n".join([f"## {table.title}", "", *lines]))
    return PAGE.format(
        runs="\n".join(f"- {name}: `{value}`" for name, value in runs(comparisons)),
        tables="\n\n".join(parts),
        versions=", ".join(f"{name} {version}" for name, version in comparisons[0]["versions"].items()) or "unknown",
        warnings="".join(f"\n{line}.\n" for line in warnings(comparisons)),
    )


def draw(comparisons: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bar chart of tokens per second of each task, with the speed-up above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(comparisons[0]["tasks"])
    series = [
        (
            "base alone",
            [one["tokens_per_second"]["base"] for one in comparisons[0]["tasks"].values()],
            [""] * len(tasks),
        )
    ]
    for name, comparison in zip(names(comparisons), comparisons, strict=True):
        rows = comparison["tasks"].values()
        times = ["" if row["speedup"] is None else f"{row['speedup']:.2f}x" for row in rows]
        series.append((name, [row["tokens_per_second"]["msd"] for row in rows], times))
    figure = Figure(figsize=(max(4.0, 1.0 + 0.8 * len(series) * len(tasks)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for number, (name, speeds, texts) in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * width
        places = [place + shift for place in range(len(tasks))]
        bars = axes.bar(places, speeds, width=width, label=name, color=COLOURS[number % len(COLOURS)])
        axes.bar_label(bars, texts, padding=2)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("tokens per second")
    axes.set_title(str(comparisons[0]["hardware"]), fontsize="small")
    axes.margins(y=0.15)
    axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = OneLineParser(prog="python -m lmms_eval_msd.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="--output_path of the run without --use_msd")
    parser.add_argument(
        "--msd", type=Path, required=True, nargs="+", help="--output_path of the run with --use_msd, of each draft"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for compare.md, compare.json and compare.png")
    parser.add_argument("--require-equal", action="store_true", help="end with status 1 if an answer differs")
    args = parser.parse_args(argv)
    from rich.console import Console

    from lmms_eval_msd.report import load_run

    base = load_run(args.base, use_msd=False)
    comparisons = [compare(base, load_run(folder, use_msd=True)) for folder in args.msd]
    write_json(args.out / "compare.json", {**comparisons[0], "others": comparisons[1:]})
    draw(comparisons, args.out / "compare.png")
    write_text(args.out / "compare.md", page(comparisons))
    console = Console()
    show(comparisons, console)
    console.print(f"page     {args.out / 'compare.md'}", soft_wrap=True, highlight=False, markup=False)
    differ = any(row["answers_equal"] < row["answers"] for one in comparisons for row in one["tasks"].values())
    return 1 if differ and args.require_equal else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

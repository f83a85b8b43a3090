"""The report of a run: acceptance and speed of each task, over all processes; and results of earlier runs.

The report goes into lmms-eval's results under "msd", into `<date>_msd.json` beside them, into lmms-eval's "throughput",
and on the screen as a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from loguru import logger
from rich import box
from rich.console import Console
from rich.table import Table

from eagle import Stats
from eagle.benchmark import Answer, Contestant, speedups
from eagle.provenance import record
from eagle.report.bench import mean_text
from llava.errors import UserError
from llava.files import read_object, write_text
from lmms_eval_msd import MODELS
from lmms_eval_msd.turns import MEASURE, Timed

RESULTS = "_results.json"
SETTINGS = ("base", "dtype", "batch_size", "processes", "hardware")
"""What two runs must have in common for their speeds to compare."""
_pending: dict[str, Any] | None = None
"""The report of the run that lmms-eval has not saved yet."""


@dataclass(frozen=True)
class Run:
    """One evaluation. ``answers``: task -> (document, number among its repeats) -> text."""

    path: Path
    scores: dict[str, dict[str, float]]
    answers: dict[str, dict[tuple[Any, int], str]]
    decoding: dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """A run of the strongest plain decoding that another one is compared with: its file and its decoding statistics."""

    path: Path
    decoding: dict[str, Any]

    @property
    def compiled(self) -> bool:
        """Whether compiled plain decoding was among the ways."""
        return any(", compiled" in name for speeds in self.decoding["baseline"]["chosen_from"] for name in speeds)

    def beside(self, timed: Sequence[Timed]) -> list[Timed]:
        """``timed`` with the plain statistics of each batch, in the tasks that have the same batches in both runs."""
        name, found = self.decoding["baseline"]["name"], []
        own: dict[str, list[list[int]]] = {}
        for each in timed:
            own.setdefault(each.task, []).append(list(each.docs))
        rows = {
            task: iter(rows)
            for task, rows in self.decoding["batches"].items()
            if [row["docs"] for row in rows] == own.get(task)
        }
        for each in timed:
            if each.task in rows:
                row = next(rows[each.task])
                times = {"seconds": row["seconds"], "first_token": row["first_token"]}
                plain = Stats(row["tokens"], requests=len(row["docs"]), **times)
                each = replace(each, plain=plain, name=name)
            found.append(each)
        return found


def gather(timed: Sequence[Timed], speeds: Mapping[str, float]) -> tuple[list[Timed], list[dict[str, float]]]:
    """The batches of all processes, and the speeds by which each chose its baseline. Every process has to call it."""
    parts = gather_object([(list(timed), dict(speeds))])
    return [each for part, _ in parts for each in part], [chosen for _, chosen in parts if chosen]


def by_task(timed: Sequence[Timed]) -> dict[str, Stats]:
    """The statistics of each task."""
    total: dict[str, Stats] = {}
    for each in timed:
        total.setdefault(each.task, Stats.empty()).merge(each.stats)
    return total


def build(
    timed: Sequence[Timed],
    settings: Mapping[str, Any],
    device: torch.device,
    baseline: Baseline | None = None,
    speeds: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """The report as plain data.

    Args:
        timed: all batches.
        settings: what the run decoded with.
        device: where it ran.
        baseline: a plain run, for the speed-up.
        speeds: those of the plain ways among which this run chose the strongest, of each process.
    """
    everything = Stats.empty()
    for each in timed:
        everything.merge(each.stats)
    made = record(device)
    report: dict[str, Any] = {
        **settings,
        **made,
        "tasks": {task: summary(part) for task, part in sorted(by_task(timed).items())},
        "total": summary(everything),
        "hardware": made["hardware"].get("gpu", made["hardware"]["cpu"]),
    }
    if speeds:
        names = sorted({max(chosen, key=lambda name: chosen[name]) for chosen in speeds})
        report["baseline"] = {"name": " and ".join(names), "chosen_from": list(map(dict, speeds)), "differences": {}}
        if not settings["use_msd"]:
            report["batches"] = {
                task: [row_of(each) for each in timed if each.task == task] for task in report["tasks"]
            }
            return report
    if baseline is not None:
        timed = baseline.beside(timed)
        report["baseline"] = {
            **baseline.decoding["baseline"],
            "results": str(baseline.path),
            "differences": differences(baseline.decoding, report),
        }
    if "baseline" in report:
        for task, row in report["tasks"].items():
            row |= speedups_of([each for each in timed if each.task == task])
        report["total"] |= speedups_of(timed)
    return report


def row_of(timed: Timed) -> dict[str, Any]:
    """A batch in the results of a plain run."""
    stats = timed.stats
    return {
        "docs": list(timed.docs),
        "tokens": stats.new_tokens,
        "seconds": stats.seconds,
        "first_token": stats.first_token,
    }


def speedups_of(timed: Sequence[Timed]) -> dict[str, Any]:
    """`eagle.benchmark.speedups` over the plain way; None everywhere if a batch has no plain times."""
    plain = [each.plain for each in timed if each.plain is not None]
    if not plain or len(plain) < len(timed):
        return {"speedup": None, "paired_speedup": None, "after_first_token": None}
    name = " and ".join(sorted({each.name for each in timed}))
    own, other = finished("MSD", [each.stats for each in timed]), finished(name, plain)
    figures = {**speedups(own, other, other), "baseline_tokens_per_second": other.total.tokens_per_second}
    equal = [each.equal for each in timed if each.equal is not None]
    if len(equal) == len(timed):
        figures["identical"] = {"answers": sum(equal), "of": own.total.requests}
    return figures


def finished(name: str, rounds: list[Stats]) -> Contestant:
    """A contestant that has answered already."""
    return Contestant(name, lambda work: Answer(Stats.empty(), []), rounds=rounds)


def summary(stats: Stats) -> dict[str, Any]:
    """Numbers of one task. ``acceptance_by_position[i]``: share of cycles that accepted drafted token i + 1."""
    lengths = stats.accept_lengths
    deepest = max(lengths, default=0)
    return {
        "answers": stats.requests,
        "tokens": stats.new_tokens,
        "cycles": stats.cycles,
        "tau": stats.tau,
        "accepted_per_cycle": stats.accepted_per_cycle,
        "seconds": stats.seconds,
        "tokens_per_second": stats.tokens_per_second,
        "histogram": {str(length): count for length, count in stats.histogram.items()},
        "acceptance_by_position": [
            sum(length >= position for length in lengths) / len(lengths) for position in range(1, deepest + 1)
        ],
        "phases_ms": stats.phases_ms,
    }


def table(report: Mapping[str, Any]) -> Table:
    """The report for the screen."""
    title = "MSD decoding" if report["use_msd"] else "plain decoding (no draft)"
    name = f"{title}, {report['dtype']}, {report['hardware']}"
    result = Table(title=name, title_justify="left", box=box.SIMPLE, collapse_padding=True)
    result.add_column("task")
    columns = ["answers", "tokens", "τ", "tokens/s", "seconds"]
    faster = "speedup" in report["total"]
    if faster:
        columns.append("speed-up")
    for name in columns:
        result.add_column(name, justify="right")
    rows = dict(report["tasks"])
    if len(rows) > 1:
        rows["all"] = report["total"]
    for task, row in rows.items():
        cells = [str(row["answers"]), str(row["tokens"]), f"{row['tau']:.2f}", f"{row['tokens_per_second']:.1f}"]
        cells.append(f"{row['seconds']:.1f}")
        if faster:
            cells.append("-" if row["speedup"] is None else f"{row['speedup']:.2f}x")
        result.add_row(task, *cells)
    return result


def publish(report: dict[str, Any]) -> None:
    """Hands the report to lmms-eval: to its throughput numbers now, to its results when it saves them."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    global _pending
    _pending = report
    total = report["total"]
    if not total["answers"]:
        logger.warning("no decoding statistics: no answer was decoded in this run (cached answers are not counted)")
        return
    log_metrics(total["seconds"], total["tokens"], total["tokens_per_second"], {"tau": total["tau"]})
    try:
        _join_results()
    except Exception as error:
        logger.warning(f"the MSD report is not in lmms-eval's results ({type(error).__name__}: {error})")
        show(report)


def _join_results() -> None:
    """Makes lmms-eval's tracker save a pending report with its own results. Done once in a process."""
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    from lmms_eval_msd.hook import wrap

    wrap(EvaluationTracker, "save_results_aggregated", _save_results)


def _save_results(original: Any, tracker: Any, *args: Any, **kwargs: Any) -> None:
    global _pending
    report, _pending = _pending, None
    source = tracker.general_config_tracker.model_source
    if isinstance(source, str) and source not in MODELS:  # our own run before this one was not saved
        report = None
    results = kwargs.get("results", args[0] if args else None)
    if report is not None and isinstance(results, dict):
        results["msd"] = report
    original(tracker, *args, **kwargs)
    if report is None:
        return
    show(report)
    if tracker.output_path and hasattr(tracker, "date_id"):
        folder = Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized
        save(report, folder / f"{tracker.date_id}_msd.json")


def save(report: Mapping[str, Any], path: Path) -> None:
    """Writes the report as JSON."""
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    logger.info(f"MSD report in {path}")


def show(report: Mapping[str, Any]) -> None:
    """Prints the table."""
    console = Console()
    console.print(table(report))
    for task, row in report["tasks"].items():
        if report["use_msd"]:
            with_bonus, without = f"{row['tau']:.2f}", f"{row['accepted_per_cycle']:.2f}"
            console.print(f"{task}, tokens per verification: {with_bonus} with the bonus token, {without} without")
        if shares := " ".join(f"{share:.2f}" for share in row["acceptance_by_position"]):
            console.print(f"{task}, accepted at position 1, 2, ...: {shares}", highlight=False)
    if "baseline" in report:
        print_baseline(report, console)
    for name, (plain, fast) in report.get("baseline", {}).get("differences", {}).items():
        console.print(f"the baseline differs in {name}: {plain}, here {fast}; the speeds are not quite comparable")


def print_baseline(report: Mapping[str, Any], console: Console) -> None:
    """Which plain decoding was the strongest, and the speed-up over it in both conventions."""
    chosen = report["baseline"]
    console.print(f"strongest plain decoding: {chosen['name']}", highlight=False)
    for speeds in chosen["chosen_from"]:
        texts = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
        console.print(f"chosen by tokens/s: {texts}", highlight=False)
    rows = dict(report["tasks"])
    if len(rows) > 1:
        rows["all"] = report["total"]
    for task, row in rows.items():
        if "speedup" not in row:  # a plain run
            continue
        if row["speedup"] is None:
            console.print(f"{task}, no speed-up: the baseline decoded other requests", highlight=False)
            continue
        console.print(f"{task}, whole requests: {speedup_text(row)}", highlight=False)
        if row["after_first_token"]["speedup"] is not None:
            console.print(f"{task}, after the first token: {speedup_text(row['after_first_token'])}", highlight=False)
        if same := row.get("identical"):
            console.print(f"{task}, identical answers: {same['answers']} of {same['of']}", highlight=False)


def speedup_text(figures: Mapping[str, Any]) -> str:
    """A speed-up in both conventions."""
    return f"totals {figures['speedup']:.2f}x, mean of requests {mean_text(figures['paired_speedup'])}"


def load_run(folder: Path, use_msd: bool) -> Run:
    """Reads the newest run below ``folder``, with its answers.

    Raises:
        UserError: there is none, it failed half-way, or it is not of that kind.
    """
    path = newest_results(folder)
    results, decoding = _read(path, use_msd, "exchange --base and --msd?")
    tasks = {task: _scores(values) for task, values in results["results"].items() if task in decoding["tasks"]}
    if not tasks:
        raise UserError("results without a task", path, "did the evaluation fail?")
    stem = path.name.removesuffix(RESULTS)
    answers = {task: _answers(path.with_name(f"{stem}_samples_{task}.jsonl")) for task in tasks}
    return Run(path, tasks, answers, decoding)


def load_baseline(path: Path) -> Baseline:
    """Reads a results file, or the newest below a folder.

    Raises:
        UserError: there is none, or it is not a run of one of our models without a draft, or that run did not look for
            the strongest plain decoding.
    """
    file = newest_results(path) if path.is_dir() else path
    decoding = _read(file, use_msd=False, fix="the baseline is a run without --use_msd")[1]
    if not {"batches", "baseline"} <= decoding.keys():
        fix = f"evaluate it with --msd_baseline {MEASURE}, or give --msd_baseline {MEASURE} to this run"
        raise UserError("a plain run that did not look for the strongest plain decoding", file, fix)
    return Baseline(file, decoding)


def newest_results(folder: Path) -> Path:
    """The newest results file below ``folder``.

    Raises:
        UserError: there is none.
    """
    files = sorted(folder.rglob(f"*{RESULTS}"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    if not files:
        raise UserError("no results of lmms-eval", folder, "did the evaluation fail?")
    return files[-1]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings in which two runs differ, so that their speeds are not quite comparable: name -> both values.

    >>> differences({"dtype": "float32", "processes": 1}, {"dtype": "bfloat16", "processes": 1})
    {'dtype': ['float32', 'bfloat16']}
    """
    pairs = {name: [one.get(name), other.get(name)] for name in SETTINGS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _read(path: Path, use_msd: bool, fix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's results, and the decoding statistics in them."""
    results = read_object(path, "results file")
    decoding = results.get("msd")
    if not isinstance(decoding, dict) or "use_msd" not in decoding:
        raise UserError("results without decoding statistics", path, "evaluate with llava_msd or another of our models")
    if decoding["use_msd"] != use_msd:
        kind = "speculative" if decoding["use_msd"] else "plain"
        raise UserError(f"these are results of {kind} decoding", path, fix)
    return results, decoding


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

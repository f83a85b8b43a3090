"""The report of a run: acceptance and speed of each task, over all processes; and results of earlier runs.

The report goes into lmms-eval's results under "msd", into `<date>_msd.json` beside them, into lmms-eval's "throughput",
and on the screen as a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from loguru import logger
from rich import box
from rich.console import Console
from rich.table import Table

from eagle import Stats
from eagle.provenance import record
from llava.errors import UserError
from llava.files import read_json, write_text
from lmms_eval_msd import MODELS

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
    """A run without a draft that another one is compared with: its file and its decoding statistics."""

    path: Path
    decoding: dict[str, Any]


def gather(own: Mapping[str, Stats]) -> dict[str, Stats]:
    """The statistics of each task, summed over the processes. Every process has to call it."""
    total: dict[str, Stats] = {}
    for part in gather_object([dict(own)]):
        for task, stats in part.items():
            total.setdefault(task, Stats.empty()).merge(stats)
    return total


def build(
    stats: Mapping[str, Stats], settings: Mapping[str, Any], device: torch.device, baseline: Baseline | None = None
) -> dict[str, Any]:
    """The report as plain data.

    Args:
        stats: of each task.
        settings: what the run decoded with.
        device: where it ran.
        baseline: a plain run, for the speed-up.
    """
    everything = Stats.empty()
    for part in stats.values():
        everything.merge(part)
    made = record(device)
    report: dict[str, Any] = {
        **settings,
        **made,
        "tasks": {task: summary(part) for task, part in sorted(stats.items())},
        "total": summary(everything),
        "hardware": made["hardware"].get("gpu", made["hardware"]["cpu"]),
    }
    return report if baseline is None else with_speedup(report, baseline)


def with_speedup(report: Mapping[str, Any], baseline: Baseline) -> dict[str, Any]:
    """``report`` with the speed-up over a plain run: of each task, and in total where both have the same tasks."""
    plain = baseline.decoding["tasks"]
    tasks = {
        task: {**row, "speedup": speedup(row, plain[task]) if task in plain else None}
        for task, row in report["tasks"].items()
    }
    total = dict(report["total"])
    total["speedup"] = speedup(total, baseline.decoding["total"]) if tasks.keys() == plain.keys() else None
    apart = differences(baseline.decoding, report)
    return {
        **report, "tasks": tasks, "total": total, "baseline": {"results": str(baseline.path), "differences": apart}
    }  # fmt: skip


def summary(stats: Stats) -> dict[str, Any]:
    """Numbers of one task. ``acceptance_by_position[i]``: share of cycles that accepted drafted token i + 1."""
    lengths = stats.accept_lengths
    deepest = max(lengths, default=0)
    return {
        "answers": stats.requests,
        "tokens": stats.new_tokens,
        "cycles": stats.cycles,
        "tau": stats.tau,
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
    if "baseline" in report:
        columns.append("speed-up")
    for name in columns:
        result.add_column(name, justify="right")
    rows = dict(report["tasks"])
    if len(rows) > 1:
        rows["all"] = report["total"]
    for task, row in rows.items():
        cells = [str(row["answers"]), str(row["tokens"]), f"{row['tau']:.2f}", f"{row['tokens_per_second']:.1f}"]
        cells.append(f"{row['seconds']:.1f}")
        if "baseline" in report:
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
        if shares := " ".join(f"{share:.2f}" for share in row["acceptance_by_position"]):
            console.print(f"{task}, accepted at position 1, 2, ...: {shares}", highlight=False)
    for name, (plain, fast) in report.get("baseline", {}).get("differences", {}).items():
        console.print(f"the baseline differs in {name}: {plain}, here {fast}; the speeds are not quite comparable")


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
        UserError: there is none, or it is not a run of one of our models without a draft.
    """
    file = newest_results(path) if path.is_dir() else path
    return Baseline(file, _read(file, use_msd=False, fix="the baseline is a run without --use_msd")[1])


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


def speedup(fast: Mapping[str, Any], plain: Mapping[str, Any]) -> float | None:
    """Tokens per second of one task's statistics over those of a plain run; None where the plain run has none."""
    reference = plain["tokens_per_second"]
    return fast["tokens_per_second"] / reference if reference else None


def _read(path: Path, use_msd: bool, fix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's results, and the decoding statistics in them."""
    results = read_json(path, "results file")
    decoding = results.get("msd")
    if not decoding:
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

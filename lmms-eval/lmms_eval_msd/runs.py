"""Reading what an lmms-eval run of one of our models left behind: scores, answers and decoding statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.files import read_json

RESULTS = "_results.json"
SETTINGS = ("base", "dtype", "batch_size", "processes", "hardware")
"""What two runs have to share for their speeds to compare."""


@dataclass(frozen=True)
class Run:
    """One evaluation. ``answers``: task -> (document, number among its repeats) -> text."""

    path: Path
    scores: dict[str, dict[str, float]]
    answers: dict[str, dict[tuple[Any, int], str]]
    decoding: dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """A plain run that another one is measured against: its file and its decoding statistics."""

    path: Path
    decoding: dict[str, Any]


def load_run(folder: Path, use_msd: bool) -> Run:
    """Reads the newest run below ``folder``, which has to have its answers.

    Raises:
        UserError: there is none, it failed half-way, or it is not of the wanted kind.
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
        UserError: there is none, or it is no plain run of one of our models.
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
    """Settings in which two runs differ, so that their speeds do not quite compare: name -> both values.

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

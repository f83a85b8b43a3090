"""Stored results of every kind, read into one form: settings, and rows of figures with their intervals.

=============  ===================================================================
kind           written by
=============  ===================================================================
bench          `msd bench --out`
server         `msd bench --server --out`
suite          `python -m benchmarks.suite`
lmms-eval      lmms-eval with one of our models: ``*_results.json``, ``*_msd.json``
gpu_check      `python -m benchmarks.gpu_check`
training       ``training.json`` of a training run with ``--eval-data``
=============  ===================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from eagle.report.intervals import Interval, of_mean, of_ratio, of_speedup
from llava.errors import UserError
from llava.files import read_json

Content = Mapping[str, Any]
SPEEDUP, PAIRED, SPEED, FIRST, TAU = "speed-up of totals", "paired speed-up", "tokens/s", "first token ms", "τ"
PLAIN, SIMULATED = "plain tokens/s", "simulated τ"
KINDS = "msd bench, benchmarks.suite, lmms-eval, benchmarks.gpu_check or a training run"
LMMS_RESULTS = "*_results.json"
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What reading a value raises that is missing or of another form."""


@dataclass(frozen=True)
class Row:
    """Figures by measure. ``part``: what was answered (a source, a task, a load, a step of training, or ``total``);
    ``way``: how it was decoded; ``identical``: answers equal to plain decoding, as text."""

    part: str
    way: str
    figures: Mapping[str, Interval]
    identical: str = ""


@dataclass(frozen=True)
class Run:
    """One file. ``settings``: what it was measured with, as text; the first row stands for the whole run."""

    path: Path
    kind: str
    settings: Mapping[str, str]
    rows: Sequence[Row]


def read_run(path: Path) -> Run:
    """Reads a file, or the newest results of lmms-eval below a folder.

    Raises:
        UserError: it is missing, not JSON, not of a known kind, or damaged.
    """
    if path.is_dir():
        found = sorted(path.rglob(LMMS_RESULTS), key=lambda file: (file.stat().st_mtime_ns, file.name))
        if not found:
            raise UserError("no results of lmms-eval in this folder", path, "name a JSON file")
        path = found[-1]
    content = read_json(path, "results file")
    kind = kind_of(content)
    if kind is None:
        raise UserError("not a file of results", path, f"give the JSON of {KINDS}")
    try:
        settings, rows = READERS[kind](content)
        if kind == "training" and not rows:
            raise UserError("a training run without evaluations", path, "train with --eval-data")
        if not rows:
            raise UserError(f"results of {kind} without a figure", path, "did the run fail?")
    except DAMAGE as error:
        what = f"results of {kind} that are not complete ({type(error).__name__}: {error})"
        raise UserError(what, path, "write them again") from None
    return Run(path, kind, {name: str(value) for name, value in settings.items() if value is not None}, rows)


KEYS = {
    "bench": ("baselines", "phases_ms", "tau", "settings"),
    "server": ("server", "levels", "settings"),
    "suite": ("suite", "cells"),
    "lmms-eval": ("use_msd", "tasks"),
    "gpu_check": ("parts", "hardware"),
    "training": ("steps", "validations"),
}
"""What a file of each kind has."""


def kind_of(content: Any) -> str | None:
    """The kind of a file, by its keys."""
    if not isinstance(content, dict):
        return None
    inner = content.get("msd")
    if isinstance(inner, dict) and "results" in content:
        content = inner
    return next((kind for kind, keys in KEYS.items() if all(key in content for key in keys)), None)


def known(figures: Mapping[str, Interval | None]) -> dict[str, Interval]:
    """The figures that there are."""
    return {name: figure for name, figure in figures.items() if figure is not None}


def plain(value: float | None) -> Interval | None:
    """A figure without a recorded spread."""
    return None if value is None else Interval(float(value))


def made(content: Content) -> dict[str, Any]:
    """Machine, versions and commit of a file with `eagle.provenance.record`."""
    hardware, versions = content.get("hardware", {}), content.get("versions", {})
    if isinstance(hardware, str):  # lmms-eval's
        hardware = {"cpu": hardware}
    machine = hardware.get("gpu") or hardware.get("cpu")
    threads = None if hardware.get("gpu") else hardware.get("threads")
    return {
        "machine": machine, "threads": threads, "torch": versions.get("torch"),
        "transformers": versions.get("transformers"), "commit": content.get("commit"), "date": content.get("date"),
    }  # fmt: skip


Read = tuple[dict[str, Any], list[Row]]


def read_bench(content: Content) -> Read:
    """Settings and rows of a file of `msd bench`."""
    settings, setting = content["settings"], content.get("setting", {})
    names = ("max_new_tokens", "data", "limit", "top_p", "top_k", "seed", "tree", "draft_image_tokens")
    found = {
        "engine": "msd bench", "base": settings["base_model"], "draft": settings["msd_model"], **made(content),
        "dtype": setting.get("dtype", settings["dtype"]), "attention": setting.get("attention"),
        "compiled": setting.get("compiled"), "batch": setting.get("batch", 1), "temperature": settings["temperature"],
        "questions": content["questions"], "baseline": content["baseline_name"],
        **{name: settings.get(name) for name in names},
    }  # fmt: skip
    answers = content.get("answers", [])
    rows = [bench_row("total", content, answers)]
    for name, figures in content.get("sources", {}).items():
        rows.append(bench_row(name, figures, [each for each in answers if (each["source"] or "unnamed") == name]))
    return found, rows


def bench_row(part: str, figures: Content, answers: Sequence[Content]) -> Row:
    """Of all questions or of one source. A file without logged answers has the intervals that are written in it."""
    paired, first, same = figures.get("paired_speedup"), figures.get("first_token_ms", {}), figures.get("identical")
    texts = {
        SPEEDUP: plain(figures["speedup"]),
        PAIRED: Interval(paired["mean"], paired["low"], paired["high"]) if paired else None,
        SPEED: plain(figures["tokens_per_second"]["msd"]),
        PLAIN: plain(figures["tokens_per_second"].get("baseline")),
        TAU: plain(figures["tau"]),
        FIRST: plain(next(iter(first.values()), None)),
    }
    if answers:
        tokens = [sum(map(len, each["cycles"])) for each in answers]
        own = [(count, each["seconds"]["msd"]) for count, each in zip(tokens, answers, strict=True)]
        other = [(each["baseline_tokens"], each["seconds"]["baseline"]) for each in answers]
        texts[SPEEDUP], texts[SPEED], texts[PLAIN] = of_speedup(own, other), of_ratio(own), of_ratio(other)
        texts[TAU] = tau_of(answers)
        texts[FIRST] = of_mean([1000 * each["first_token_seconds"]["msd"] for each in answers])
    near = f" ({same['near_ties']} differ at a near tie)" if same and same.get("near_ties") else ""
    return Row(part, "MSD", known(texts), f"{same['answers']}/{same['of']}{near}" if same else "")


def tau_of(answers: Sequence[Content]) -> Interval | None:
    """New tokens per cycle of logged answers; the first entry of ``cycles`` is the prefill's token."""
    return of_ratio([(sum(map(len, each["cycles"][1:])), len(each["cycles"]) - 1) for each in answers])


def read_server(content: Content) -> Read:
    """Settings and rows of a file of `msd bench --server`."""
    settings = content["settings"]
    found = {
        "engine": "server", "base": content["model"], "draft": "of the server", **made(content),
        "temperature": settings.get("temperature"), "max_new_tokens": settings.get("max_tokens"),
        "data": settings.get("data"), "questions": settings.get("questions"),
        "top_p": settings.get("top_p"), "top_k": settings.get("top_k"),
        "seed": settings.get("seed"), "baseline": content.get("plain"),
    }  # fmt: skip
    rows = []
    for level in content["levels"]:
        load = f"{level['rate']:g} a second" if level["concurrency"] is None else f"{level['concurrency']} at a time"
        figures = {
            SPEEDUP: plain(level.get("speedup")), SPEED: plain(level["tokens_per_second"]),
            TAU: plain(level.get("acceptance_length")), FIRST: plain(level["first_token_ms"]["median"]),
        }  # fmt: skip
        same = f"{level['equal_answers']}/{level['requests']}" if "equal_answers" in level else ""
        rows.append(Row(load, "server", known(figures), same))
    return found, rows


def read_suite(content: Content) -> Read:
    """Settings and rows of a file of `benchmarks.suite`."""
    settings = content["settings"]
    models = {name: [pair.get("base"), pair.get("draft")] for name, pair in settings["models"].items()}
    found = {
        "engine": "benchmarks.suite", "suite": content["suite"], "models": models, **made(content),
        "dtype": settings["dtype"], "data": settings["data"], "rounds": settings["rounds"],
        "seed": settings["seed"], "tolerance": settings["tolerance"],
    }  # fmt: skip
    commits = [cell.get("commit", content.get("commit")) for cell in content["cells"]]
    found["commit"] = ", ".join(dict.fromkeys(filter(None, commits))) or None
    rows = []
    for cell in content["cells"]:
        rounds = [n for n in range(cell["rounds"]) if cell["doubtful"] or n not in cell["noisy_rounds"]]
        best = [(cell["results"][cell["baseline_name"]], n) for n in rounds]
        other = [(result["new_tokens"], result["seconds"][n]) for result, n in best]
        for name, result in sorted(cell["results"].items(), key=lambda item: not item[0].startswith("msd")):
            own = [(result["new_tokens"], result["seconds"][n]) for n in rounds]
            figures = {
                SPEEDUP: of_speedup(own, other), SPEED: of_ratio(own), FIRST: plain(result["first_token_ms"]),
                TAU: plain(result["tau"]) if name.startswith("msd") else None,
            }  # fmt: skip
            differ = result["answers_that_differ"]
            rows.append(Row(cell["title"], name, known(figures), "" if differ is None else f"{differ} differ"))
    return found, sorted(rows, key=lambda row: not row.way.startswith("msd"))


def read_lmms(content: Content) -> Read:
    """Settings and rows of a file of lmms-eval."""
    decoding = content["msd"] if "results" in content else content
    found = {
        "engine": "lmms-eval", "base": decoding["base"], "draft": decoding.get("draft"), **made(decoding),
        "dtype": decoding["dtype"], "compiled": decoding.get("compile"), "batch": decoding["batch_size"],
        "processes": decoding["processes"], "tree": decoding.get("tree"),
        "draft_image_tokens": decoding.get("draft_image_tokens"),
        "baseline": decoding.get("baseline", {}).get("name"),
    }  # fmt: skip
    way = "MSD" if decoding["use_msd"] else "plain"
    rows = []
    for task, figures in decoding["tasks"].items():
        paired = figures.get("paired_speedup")
        measured = {
            SPEEDUP: plain(figures.get("speedup")), SPEED: plain(figures["tokens_per_second"]),
            PAIRED: Interval(paired["mean"], paired["low"], paired["high"]) if paired else None,
            PLAIN: plain(figures.get("baseline_tokens_per_second")),
            TAU: plain(figures["tau"]) if decoding["use_msd"] else None,
        }  # fmt: skip
        rows.append(Row(task, way, known(measured) | scores_of(content.get("results", {}).get(task, {}))))
    return found, rows


def scores_of(values: Content) -> dict[str, Interval]:
    """lmms-eval's scores of a task, with the interval of its standard error."""
    scores = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if filtered and isinstance(value, int | float) and "stderr" not in name:
            error = values.get(f"{name}_stderr,{filtered}")
            spread = 1.96 * error if isinstance(error, int | float) else None
            scores[name] = Interval(value) if spread is None else Interval(value, value - spread, value + spread)
    return scores


def read_gpu_check(content: Content) -> Read:
    """Settings and rows of a file of `benchmarks.gpu_check`."""
    settings = content["settings"]
    found = {
        "engine": "benchmarks.gpu_check", "base": settings.get("base"), "draft": settings.get("draft"),
        **made(content), "dtype": settings["dtype"], "max_new_tokens": settings["new_tokens"],
        "questions": settings["questions"], "batch": 1, "temperature": 0.0,
    }  # fmt: skip
    rows, same = [], {}
    for part in content["parts"]:
        name, _, what = part["name"].partition(": ")
        if what == "identity of answers" and part["error"] is None:
            same[name] = f"{part['figures']['questions'] - part['figures']['differ']}/{part['figures']['questions']}"
        if what == "speed" and part["error"] is None:
            for way in part["figures"]["ways"]:
                measures = {
                    SPEEDUP: way["speed-up of totals"], PAIRED: way["mean of paired speed-ups"],
                    SPEED: way["tokens/s"], FIRST: way["first token ms"],
                    TAU: way["tau"] if way["way"].startswith("MSD") else None,
                }  # fmt: skip
                figures = known({measure: plain(value) for measure, value in measures.items()})
                rows.append(Row(name, way["way"], figures, same.get(name, "") if way["way"] == "MSD" else ""))
    return found, sorted(rows, key=lambda row: not row.way.startswith("MSD"))


def read_training(content: Content) -> Read:
    """Settings and rows of ``training.json``."""
    losses = {row["step"]: row["loss"] for row in content["steps"]}
    simulated = {
        row["step"]: fmean(values["tau"] for values in row["results"].values()) for row in content["validations"]
    }
    rows = []
    for each in content.get("served", []):
        validated = max((step for step in simulated if step <= each["step"]), default=None)  # the newest before it
        figures = {
            TAU: tau_of(each["answers"]), SIMULATED: plain(simulated.get(validated)),
            "training loss": plain(losses.get(each["step"])),
        }  # fmt: skip
        rows.append(Row(f"step {each['step']}", "MSD", known(figures)))
    return {"engine": "training", **content.get("settings", {})}, rows[::-1]  # the newest stands for the run


READERS: dict[str, Callable[[Content], Read]] = {
    "bench": read_bench,
    "server": read_server,
    "suite": read_suite,
    "lmms-eval": read_lmms,
    "gpu_check": read_gpu_check,
    "training": read_training,
}


def pairs_of(first: Run, other: Run) -> Iterator[tuple[Row, Row]]:
    """Rows of two runs that answer the same and decode the same way; if there are none, the rows that stand for the
    whole runs. In a training run the step decides nothing: its newest evaluation is compared."""
    theirs = {(row.part, row.way): row for row in other.rows}
    found = [(row, theirs[row.part, row.way]) for row in first.rows if (row.part, row.way) in theirs]
    if not found or "training" in (first.kind, other.kind):
        found = [(first.rows[0], other.rows[0])]
    yield from found

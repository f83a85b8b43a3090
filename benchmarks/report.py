"""The report of a suite run, as JSON and as a table."""

from __future__ import annotations

import json
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from benchmarks.spec import Cell, Suite
from eagle.benchmark import Contestant, Quiet, find_quiet, speed
from eagle.decode.stats import Stats
from eagle.provenance import record
from llava.arguments import is_greedy
from llava.errors import UserError

SCHEMA = 1
ORIGIN = ("date", "commit", "command")
"""How a cell was measured. A cell of an older report has those of the report."""
AGREE = ("schema", "suite", "settings", "environment", "hardware", "versions")
"""What all cells of a report have in common."""
NOISY = "≈"
"""Mark of a cell whose rounds were noisy for the most part."""


def header(suite: Suite, device: torch.device, module: str, argv: Sequence[str]) -> dict[str, Any]:
    """The record of the run, with its settings."""
    settings = asdict(suite)
    for name in ("cells", "where"):
        settings.pop(name)
    return {
        **record(device),
        "schema": SCHEMA,
        "suite": suite.name,
        "command": shlex.join(["python", "-m", module, *argv]),
        "memory_bytes": psutil.virtual_memory().total,
        "environment": {
            name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
        },
        "settings": settings,
        "cells": [],
    }


def continued(report: dict[str, Any], earlier: Mapping[str, Any], where: Path) -> list[dict[str, Any]]:
    """The cells of an ``earlier`` report, to be kept beside those of a new one. Each has its `ORIGIN`.

    Raises:
        UserError: the reports differ in `AGREE`.
    """
    new, apart = json.loads(json.dumps(report)), list[str]()
    for key in AGREE:
        one, other = earlier.get(key), new[key]
        if isinstance(one, dict) and isinstance(other, dict):
            names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
            apart += [f"{key}.{name} was {one.get(name)}, is {other.get(name)}" for name in names]
        elif one != other:
            apart.append(f"{key} was {one}, is {other}")
    if apart:
        raise UserError(f"cells of another kind of run are in this report: {'; '.join(apart)}", where, "another --out")
    return [{**{key: earlier[key] for key in ORIGIN}, **cell} for cell in earlier["cells"]]


def days(report: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """The day on which cells were measured, or the first and the last."""
    found = sorted({str(cell.get("date", report["date"]))[:10] for cell in cells})
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def commits(report: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """The commits of cells, each once."""
    return ", ".join(dict.fromkeys(str(cell.get("commit", report["commit"]))[:12] for cell in cells))


def made_by(report: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """Commands and commit of cells; if commits or days differ, those of each group of cells, with its day."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell.get("command", report["command"]), commits(report, [cell])), []).append(cell)
    texts = {key: f"`{key[0]}`, commit {key[1]}" for key in groups}
    if len({(commit, days(report, group)) for (_, commit), group in groups.items()}) == 1:
        commit = next(iter(groups))[1]
        return f"{' and '.join(f'`{command}`' for command, _ in groups)}, commit {commit}"
    return "; ".join(
        f"{' and '.join(dict.fromkeys(cell['title'] for cell in group))}: {texts[key]}, {days(report, group)}"
        for key, group in groups.items()
    )


def row_of_cell(
    cell: Cell, runners: Sequence[Contestant], left_out: dict[str, str], suite: Suite, loads: Sequence[float | None],
    random: bool,
) -> dict[str, Any]:  # fmt: skip
    """All that was measured in one cell."""
    quiet = find_quiet(runners, suite.tolerance)
    best = max(
        (runner for runner in runners if runner.plain),
        key=lambda runner: runner.median(lambda stats: stats.tokens_per_second, quiet.rounds),
    )
    ours = next((runner for runner in runners if runner.name == "autoregressive"), runners[0])
    reference = ours.tokens if is_greedy(cell.temperature) else None
    return {
        **asdict(cell),
        "title": cell.title,
        "cost_only": random,
        "rounds": len(runners[0].rounds),
        "noisy_rounds": list(quiet.noisy),
        "doubtful": quiet.doubtful,
        "load_average": list(loads),
        "baseline_name": best.name,
        "results": {runner.name: result(runner, best, quiet, reference) for runner in runners},
        "left_out": left_out,
    }


def result(runner: Contestant, best: Contestant, quiet: Quiet, reference: list[list[int]] | None) -> dict[str, Any]:
    """One contestant: medians over the rounds that count. Speed-up is the median of the ratios within each round."""

    ratios = [speed(runner.rounds[n]) / speed(best.rounds[n]) for n in quiet.rounds]
    total = Stats.empty()
    for number in quiet.rounds:
        total.merge(runner.rounds[number])
    differing = None if reference is None else sum(a != b for a, b in zip(runner.tokens, reference, strict=True))
    return {
        "tokens_per_second": runner.median(speed, quiet.rounds),
        "spread": runner.spread(speed, quiet.rounds),
        "speedup": statistics.median(ratios),
        "first_token_ms": runner.median(lambda stats: 1000 * stats.first_token / stats.requests, quiet.rounds),
        "decoding_tokens_per_second": runner.median(lambda stats: stats.decoding_speed, quiet.rounds),
        "tau": total.tau or None,
        "new_tokens": runner.rounds[0].new_tokens,
        "answers_that_differ": differing,
        "phases_share": total.shares() if total.cycles else {},
        "seconds": [stats.seconds for stats in runner.rounds],
    }


def table_of(report: dict[str, Any]) -> Table:
    """One line a contestant, one section a cell."""
    table = Table(
        title=f"suite {report['suite']}, {report['hardware']['cpu']}, commit {commits(report, report['cells'])}"
    )
    columns = ("decoding", "tokens/s", "spread", "speed-up", "first token", "decoding tokens/s", "τ", "differ")
    for column in columns:
        table.add_column(column, justify="left" if column == "decoding" else "right", no_wrap=column == "decoding")
    for cell in report["cells"]:
        table.add_section()
        marks = [f"{len(cell['noisy_rounds'])} of {cell['rounds']} rounds noisy"] if cell["noisy_rounds"] else []
        marks += ["random weights: costs only"] if cell["cost_only"] else []
        table.add_row(f"[bold]{cell['title']}" + (f" ({'; '.join(marks)})" if marks else ""))
        for name, row in cell["results"].items():
            mark = NOISY if cell["doubtful"] else ""
            table.add_row(
                f"  {name}" + (" (baseline)" if name == cell["baseline_name"] else ""),
                f"{mark}{row['tokens_per_second']:.1f}", f"{row['spread']:.0%}", f"{mark}{row['speedup']:.2f}x",
                f"{row['first_token_ms']:.0f} ms", f"{row['decoding_tokens_per_second']:.1f}",
                f"{row['tau']:.2f}" if row["phases_share"] and row["tau"] > 1 else "",
                "" if row["answers_that_differ"] is None else str(row["answers_that_differ"]),
            )  # fmt: skip
        for name, reason in cell["left_out"].items():
            table.add_row(f"  [dim]{name}: {reason}")
    return table


def phase_table(report: dict[str, Any]) -> Table:
    """Where a cycle's time goes, one line for each contestant with cycles."""
    names: list[str] = []
    rows = []
    for cell in report["cells"]:
        for name, row in cell["results"].items():
            shares = row["phases_share"].get("cycle")
            if shares and name.startswith("msd"):
                names = list(shares)
                rows.append((f"{cell['title']}, {name}", shares))
    table = Table("share of a cycle", title="phases")
    for name in names:
        table.add_column(name, justify="right")
    for title, shares in rows:
        table.add_row(title, *(f"{shares[name]:.1%}" for name in names))
    return table

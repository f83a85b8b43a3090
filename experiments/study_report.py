"""results.json, results.md and results.png of the training study, from the records of its cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.steps import told
from llava.files import atomic_write, write_json

Row = Mapping[str, Any]

COLUMNS: dict[str, Callable[[Row], float | None]] = {
    "τ (tree)": lambda row: row["tau"],
    "τ (chain)": lambda row: row["tau_chain"],
    "speed-up": lambda row: row["speedup"],
    "simulated τ, pictures": lambda row: row["simulated_tau"].get("image"),
    "simulated τ, text": lambda row: row["simulated_tau"].get("text"),
}
PLOTTED = ("τ (tree)", "speed-up")


def write_report(folder: Path, rows: Sequence[Row], made: Mapping[str, Any]) -> None:
    """Writes the three files anew. ``rows``: the records so far."""
    write_json(folder / "results.json", {**made, "cells": list(rows)})
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(table(rows, made), encoding="utf-8")
    plot(rows, folder / "results.png")


def by_cell(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The records of each cell, seeds together."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    return cells


def spread(values: Sequence[float | None]) -> str:
    """Mean, and the range where there are several.

    >>> spread([2.0, 2.5]), spread([3.0]), spread([None])
    ('2.25 (2.00 to 2.50)', '3.00', '')
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    wide = f" ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else ""
    return f"{mean(known):.2f}{wide}"


def table(rows: Sequence[Row], made: Mapping[str, Any]) -> str:
    """A markdown table, a row a cell: means over seeds, and their range."""
    first = rows[0]
    head = ["training", "what", "seeds", *COLUMNS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 3}{'---:|' * len(COLUMNS)}"]
    for name, cell in by_cell(rows).items():
        seeds = ", ".join(str(row["seed"]) for row in cell)
        values = [spread([read(row) for row in cell]) for read in COLUMNS.values()]
        lines.append(f"| {' | '.join([name, cell[0]['what'], seeds, *values])} |")
    note = (
        f"{first['base']}, {first['steps']} steps each, {first['questions']} held-out questions with pictures, greedy; "
        f"mean (lowest to highest) over seeds. {told(made)}."
    )
    return "\n".join([*lines, "", note, ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """A dot for each seed, a bar for their mean; acceptance on the left, speed on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = by_cell(rows)
    places = range(len(cells))
    figure, panels = pyplot.subplots(
        1, len(PLOTTED), figsize=(11, 1.2 + 0.45 * len(cells)), sharey=True, layout="constrained"
    )
    for axes, title in zip(panels, PLOTTED, strict=True):
        read = COLUMNS[title]
        values = [[float(read(row) or 0.0) for row in cell] for cell in cells.values()]
        axes.barh(places, [mean(each) for each in values], height=0.6, color="tab:blue", alpha=0.35)
        for place, each in zip(places, values, strict=True):
            axes.plot(each, [place] * len(each), "o", ms=4, color="tab:blue")
        axes.set(title=title, yticks=list(places), yticklabels=list(cells), xlim=(0, None))
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)

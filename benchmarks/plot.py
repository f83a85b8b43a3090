"""The suite's figures as one picture: speed-up of each contestant, one panel per cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import days
from llava.files import atomic_write

COLUMNS = 2
PLAIN, OURS, OTHER = "0.7", "#2563a8", "#c98a2b"
WIDTH, DPI = 14.0, 130  # inches; of everything
COMPACT_WIDTH, COMPACT_DPI = 10.0, 110  # of some cells: a README's width


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG of all cells. Bars reach to the median; the line at 1 is the cell's strongest plain baseline; a
    noisy cell is hatched."""
    figure = panels(report["cells"], [cell["title"] for cell in report["cells"]], WIDTH)
    place = report["hardware"].get("gpu") or f"{report['hardware']['cpu']}, {report['hardware']['threads']} threads"
    when = days(report, report["cells"])
    figure.suptitle(f"Speed-up over the strongest plain decoding of the same run\n{place}, {when}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def draw_compact(cells: Sequence[Mapping[str, Any]], titles: Sequence[str], path: Path, source: str) -> None:
    """Writes a PNG of some cells under titles of their own; ``source`` is kept in the file."""
    figure = panels(cells, titles, COMPACT_WIDTH)
    figure.suptitle("Speed-up over the strongest plain decoding of the same run", fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=COMPACT_DPI, metadata={"Software": None, "Source": source})


def panels(cells: Sequence[Mapping[str, Any]], titles: Sequence[str], width: float) -> Figure:
    """A figure with one panel per cell."""
    rows = -(-len(cells) // COLUMNS)
    longest = max(len(cell["results"]) for cell in cells)
    figure = Figure(figsize=(width, (0.9 + 0.3 * longest) * rows), layout="constrained")
    places = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes, cell, title in zip(places, cells, titles, strict=False):
        draw_cell(axes, cell, title)
    for axes in places[len(cells) :]:
        axes.set_visible(False)
    return figure


def draw_cell(axes: Axes, cell: Mapping[str, Any], title: str) -> None:
    """A bar for each contestant."""
    names = list(cell["results"])[::-1]
    speeds = [cell["results"][name]["speedup"] for name in names]
    colours = [OURS if name.startswith("msd") else PLAIN if "lookup" not in name and name != "assistant" else OTHER
               for name in names]  # fmt: skip
    bars = axes.barh(names, speeds, color=colours, hatch="//" if cell["doubtful"] else None)
    axes.bar_label(bars, [f"{speed:.2f}x" for speed in speeds], padding=3, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlim(0, max([1.2, *speeds]) * 1.15)
    notes = [note for note, true in (("noisy", cell["doubtful"]), ("costs only", cell["cost_only"])) if true]
    axes.set_title(title + (f" ({', '.join(notes)})" if notes else ""), fontsize=9)
    axes.tick_params(labelsize=8)

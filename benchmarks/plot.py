"""The suite's figures as one picture: speed-up of each contestant, one panel a cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from llava.files import atomic_write

COLUMNS = 2
PLAIN, OURS, OTHER = "0.7", "#2563a8", "#c98a2b"


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG. Bars reach to the median; the line at 1 is the cell's strongest plain baseline; a noisy cell is
    hatched."""
    cells = report["cells"]
    rows = -(-len(cells) // COLUMNS)
    longest = max(len(cell["results"]) for cell in cells)
    figure = Figure(figsize=(7 * COLUMNS, (0.9 + 0.3 * longest) * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel, cell in zip(panels, cells, strict=False):
        names = list(cell["results"])[::-1]
        speeds = [cell["results"][name]["speedup"] for name in names]
        colours = [OURS if name.startswith("msd") else PLAIN if "lookup" not in name and name != "assistant" else OTHER
                   for name in names]  # fmt: skip
        bars = panel.barh(names, speeds, color=colours, hatch="//" if cell["doubtful"] else None)
        panel.bar_label(bars, [f"{speed:.2f}x" for speed in speeds], padding=3, fontsize=8)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_xlim(0, max([1.2, *speeds]) * 1.15)
        notes = [note for note, true in (("noisy", cell["doubtful"]), ("costs only", cell["cost_only"])) if true]
        panel.set_title(cell["title"] + (f" ({', '.join(notes)})" if notes else ""), fontsize=9)
        panel.tick_params(labelsize=8)
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    place = report["hardware"].get("gpu") or f"{report['hardware']['cpu']}, {report['hardware']['threads']} threads"
    figure.suptitle(f"Speed-up over the strongest plain decoding of the same run\n{place}, {report['date'][:10]}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)

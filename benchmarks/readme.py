"""README's figures of speed, from a report of the suite (`make bench`), so that no figure is copied by hand.

    python -m benchmarks.readme                                  # tables into README.md, plot into docs/speed.png
    python -m benchmarks.readme --report benchmarks/pocket.json  # from another report, which README names from then on
    python -m benchmarks.readme --check                          # exit status 1 if README has other figures

The figures stand between two marks in README.md; the first one names the report. Of the suite's cells they are those
of one question at a time, without further context: for each pair and temperature the one with the longest answers. A
report of `msd bench` gives one table of its pair and no plot.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import bench_table
from benchmarks.plot import draw_compact
from benchmarks.report import NOISY
from eagle.hidden_states.index import sha256
from llava.errors import UserError, run_cli
from llava.files import atomic_write, read_json

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- figures: )(\S+)( -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
PLOT = "docs/speed.png"
PAIRS = {"llava": "LLaVA", "qwen2vl": "Qwen2-VL"}
NAMES = {
    "autoregressive": "our autoregressive loop",
    "transformers dynamic": "transformers `generate`",
    "transformers static": "transformers `generate`, static cache",
    "prompt lookup": "transformers' prompt lookup",
    "assistant": "transformers' assisted decoding",
    "msd": "**MSD**",
    "msd reset": "MSD, without memory of earlier requests",
    "msd fixed": "MSD, fixed tree",
}
DTYPES = ("float32", "bfloat16", "float16")
Cell = Mapping[str, Any]


def chosen(report: Mapping[str, Any]) -> dict[float, list[Cell]]:
    """The cells that README shows, by temperature, a cell a pair.

    Raises:
        UserError: the report has none.
    """
    longest: dict[tuple[float, str], Cell] = {}
    for cell in report["cells"]:
        key = (cell["temperature"], cell["model"])
        shown = cell["batch"] == 1 and not cell["context"] and not cell["cost_only"]
        if shown and (key not in longest or longest[key]["new_tokens"] < cell["new_tokens"]):
            longest[key] = cell
    if not longest:
        raise UserError("report has no cell of one question at a time", fix="run the whole suite")
    temperatures = sorted({temperature for temperature, _ in longest})
    return {each: [cell for (t, _), cell in longest.items() if t == each] for each in temperatures}


def name_of(cell: Cell) -> str:
    """The pair of a cell: ``pocket-llava`` is the pocket LLaVA."""
    kind, _, family = str(cell["model"]).partition("-")
    return f"{kind} {PAIRS.get(family, family)}" if family else kind


def how(temperature: float) -> str:
    """Greedy, or the temperature that tokens are sampled at."""
    return "greedy" if temperature == 0 else f"sampled at T = {temperature:g}"


def label(contestant: str) -> str:
    """A contestant of the suite in words.

    >>> label("transformers dynamic bfloat16"), label("msd 4/3/8")
    ('transformers `generate`, bfloat16', 'MSD, tree 4/3/8')
    """
    words, _, dtype = contestant.rpartition(" ")
    if dtype in DTYPES:
        return f"{label(words)}, {dtype}"
    if contestant.startswith("msd ") and contestant not in NAMES:
        return f"MSD, tree {dtype}"
    return NAMES.get(contestant, contestant)


def table_of(temperature: float, cells: Sequence[Cell]) -> str:
    """One temperature: a row a contestant, four columns a pair. A pair's strongest plain baseline is in italics."""
    pairs = [name_of(cell) for cell in cells]
    head = "".join(f" {pair}: tokens/s | τ | speed-up | after the first token |" for pair in pairs)
    lines = [f"| {how(temperature)} |{head}", "|---|" + "---:|" * (4 * len(cells))]
    names = dict.fromkeys(name for cell in cells for name in cell["results"])
    for name in names:
        values = " | ".join(values_of(cell, name) for cell in cells)
        lines.append(f"| {label(name)} | {values} |")
    return "\n".join(lines) + "\n"


def values_of(cell: Cell, name: str) -> str:
    """Speed, τ and speed-up of a contestant, of the whole request and of what follows its first token; nothing where it
    did not run."""
    row = cell["results"].get(name)
    if row is None:
        return " | | | "
    later = row["decoding_tokens_per_second"] / cell["results"][cell["baseline_name"]]["decoding_tokens_per_second"]
    mark = NOISY if cell["doubtful"] else ""
    style = "*" if name == cell["baseline_name"] else "**" if name == "msd" else ""
    tau = f"{row['tau']:.2f}" if row["phases_share"] and row["tau"] > 1 else ""
    whole = f"{mark}{row['tokens_per_second']:.0f} | {tau} | {style}{mark}{row['speedup']:.2f}x{style}"
    return f"{whole} | {mark}{later:.2f}x"


def caption(report: Mapping[str, Any], cells: Sequence[Cell], where: str) -> str:
    """When, where, with what and by which command."""
    machine, versions, settings = report["hardware"], report["versions"], report["settings"]
    device = machine.get("gpu") or f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads)"
    dtypes = sorted({cell["dtype"] for cell in cells if "dtype" in cell})
    everyone = f", {' and '.join(dtypes)} where no dtype is named" if dtypes else ""
    noisy = f" {NOISY}: most rounds were disturbed." if any(cell["doubtful"] for cell in cells) else ""
    questions = max(cell["questions"] for cell in cells)
    return (
        f"{report['date'][:10]}, {device}, torch {versions['torch']}, transformers {versions['transformers']}"
        f"{everyone}; "
        f"{settings['rounds']} interleaved rounds of {questions} held-out questions, answers of up to "
        f"{max(cell['new_tokens'] for cell in cells)} tokens; medians; speed-up over the strongest plain decoding (in "
        f"italics), of the whole request with its picture and prompt, and of decoding alone.{noisy} "
        f"`{report['command']}`, commit {str(report['commit'])[:12]} ([report]({where})).\n"
    )


def block_of(report: Mapping[str, Any], where: str) -> str:
    """All that stands between the marks. ``where``: the report's path in the repository."""
    if "cells" not in report:
        return bench_table.table_of(report)
    shown = chosen(report)
    cells = [cell for each in shown.values() for cell in each]
    tables = "\n".join(table_of(temperature, each) for temperature, each in shown.items())
    return f"{tables}\n![speed-up of each way to decode]({PLOT})\n\n{caption(report, cells, where)}"


def renewed(text: str, repository: Path, report: str | None = None) -> str:
    """README's ``text`` with the figures that its report, or another ``report`` of the ``repository``, has.

    Raises:
        UserError: the marks are missing, or the report cannot be read.
    """
    found = BLOCK.search(text)
    if found is None:
        raise UserError("README has no marks for its figures", fix="put them around the table")
    where = report or found[2]
    block = block_of(read_json(repository / where, "bench report"), where)
    return text[: found.start()] + found[1] + where + found[3] + block + found[5] + text[found.end() :]


def draw_plot(report: Mapping[str, Any], path: Path, source: str) -> None:
    """README's plot."""
    shown = [(cell, f"{name_of(cell)}, {how(t)}") for t, cells in chosen(report).items() for cell in cells]
    draw_compact([cell for cell, _ in shown], [title for _, title in shown], path, source)


def drawn_from(path: Path) -> str | None:
    """The checksum of the report that a plot was drawn from; None where there is no plot."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return str(image.info.get("Source"))


def run(argv: Sequence[str]) -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--report", metavar="PATH", help="of a report, from the repository's root (default: README's)")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="folder of README.md")
    options = parser.parse_args(argv)
    page, plot = options.repository / "README.md", options.repository / PLOT
    text = page.read_text(encoding="utf-8")
    wanted = renewed(text, options.repository, options.report)
    named = BLOCK.search(wanted)
    assert named is not None
    path = options.repository / named[2]
    report, source = read_json(path, "bench report"), sha256(path)
    if options.check:
        return int(wanted != text or ("cells" in report and drawn_from(plot) != source))
    if "cells" in report:
        draw_plot(report, plot, source)
    with atomic_write(page) as temporary:
        temporary.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda: run(sys.argv[1:])))

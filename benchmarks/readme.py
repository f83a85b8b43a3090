"""The speed figures of README.md and docs/speed.md, written from a report of the suite (`make bench`).

    python -m benchmarks.readme                                  # both pages and docs/speed.png
    python -m benchmarks.readme --report benchmarks/pocket.json  # from another report, which the pages name afterwards
    python -m benchmarks.readme --check                          # exit status 1 if the pages have other figures

In each page the figures stand between two markers; the first one names the report. README has the strongest plain
decoding, the best other speculation, and MSD greedy and at T = 1, also compiled where it was measured. docs/speed.md
has every contestant. Both show the cells of one question at a time without further context: for each pair and
temperature the one with the longest answers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eagle.hidden_states.index import sha256
from llava.arguments import OneLineParser, is_greedy
from llava.errors import UserError, run_cli
from llava.files import read_json, write_text

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
    "msd reset": "MSD, acceptance statistics reset for each request",  # older reports have it
    "msd fixed": "MSD, fixed tree",
}
OTHERS = ("prompt lookup", "assistant")
PLAIN = ("autoregressive", "transformers")
"""How the names of plain ways begin."""
COMPILED = ("msd compiled", "msd fixed compiled")
"""The first one of them that was measured is in README."""
DTYPES = ("float32", "bfloat16", "float16")
Cell = Mapping[str, Any]
Shown = Mapping[float, Sequence[Cell]]
"""The cells that are shown, by temperature, one cell per pair."""


def chosen(report: Mapping[str, Any]) -> dict[float, list[Cell]]:
    """The cells of a report that are shown, by temperature.

    Raises:
        UserError: the report has none.
    """
    longest: dict[tuple[float, str], Cell] = {}
    for cell in report.get("cells", ()):
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
    """Greedy, or the temperature of sampling."""
    return "greedy" if is_greedy(temperature) else f"sampled at T = {temperature:g}"


def label(contestant: str) -> str:
    """A contestant of the suite in words.

    >>> label("transformers dynamic bfloat16"), label("msd 4/3/8"), label("msd compiled")
    ('transformers `generate`, bfloat16', 'MSD, tree 4/3/8', '**MSD**, compiled')
    """
    words, _, dtype = contestant.rpartition(" ")
    if dtype in (*DTYPES, "compiled"):
        return f"{label(words)}, {dtype}"
    if contestant.startswith("msd ") and contestant not in NAMES:
        return f"MSD, tree {dtype}"
    return NAMES.get(contestant, contestant)


def values_of(cell: Cell, name: str) -> list[str]:
    """Tokens per second, τ and speed-up of the whole request, and the speed-up after the first token, each over the
    strongest plain way for it; empty where the contestant did not run."""
    from benchmarks.report import NOISY

    row = cell["results"].get(name)
    if row is None:
        return ["", "", "", ""]
    plain = [each for way, each in cell["results"].items() if way.startswith(PLAIN)]
    later = row["decoding_tokens_per_second"] / max(each["decoding_tokens_per_second"] for each in plain)
    mark = NOISY if cell["doubtful"] else ""
    style = "*" if name == cell["baseline_name"] else "**" if name == "msd" else ""
    tau = f"{row['tau']:.2f}" if row["phases_share"] and row["tau"] > 1 else ""
    speed, gain = f"{mark}{row['tokens_per_second']:.0f}", f"{style}{mark}{row['speedup']:.2f}x{style}"
    return [speed, tau, gain, f"{mark}{later:.2f}x"]


def line(title: str, values: Sequence[str]) -> str:
    return f"| {title} | {' | '.join(values)} |\n"


def readme_block(report: Mapping[str, Any], where: str) -> str:
    """README's lines: tokens per second, τ and speed-up of the whole request for each pair."""
    shown = chosen(report)
    greedy, sampled = shown[min(shown)], shown[max(shown)]

    def best_other(cell: Cell) -> str:
        return max((name for name in OTHERS if name in cell["results"]), default="",
                   key=lambda name: cell["results"][name]["speedup"])  # fmt: skip

    def row(title: str, cells: Sequence[Cell], contestant: Callable[[Cell], str]) -> str:
        return line(title, [value for cell in cells for value in values_of(cell, contestant(cell))[:3]])

    head = [title for cell in greedy for title in (f"{name_of(cell)}: tokens/s", "τ", "speed-up")]
    rows = [
        line("", head),
        line("---", ["---:"] * len(head)).replace(" ", ""),
        row("strongest plain decoding, greedy", greedy, lambda cell: cell["baseline_name"]),
        row("best other speculation, greedy", greedy, best_other),
    ]
    measured = [name for name in COMPILED if any(name in cell["results"] for cell in [*greedy, *sampled])]
    for text, cells in (("greedy", greedy), (how(max(shown)), sampled)):
        rows += [line(f"{label(name)}, {text}", [value for cell in cells for value in values_of(cell, name)[:3]])
                 for name in ("msd", *measured[:1])]  # fmt: skip
    from benchmarks.report import made_by

    made = f"{made_by(report, [*greedy, *sampled])}."
    everything = f"{made} All contestants and settings: [docs/speed.md](docs/speed.md), [report]({where}).\n"
    return f"{''.join(rows)}\n{caption(report, [*greedy, *sampled])} {everything}"


def speed_block(report: Mapping[str, Any], where: str) -> str:
    """The tables of docs/speed.md: one per temperature, one line per contestant, four columns per pair. The strongest
    plain baseline of a pair is in italics."""
    from benchmarks.report import made_by

    shown = chosen(report)
    tables = []
    for temperature, cells in shown.items():
        columns = ("τ", "speed-up", "after the first token")
        head = [title for cell in cells for title in (f"{name_of(cell)}: tokens/s", *columns)]
        rows = [line(how(temperature), head), line("---", ["---:"] * len(head)).replace(" ", "")]
        for name in dict.fromkeys(name for cell in cells for name in cell["results"]):
            rows.append(line(label(name), [value for cell in cells for value in values_of(cell, name)]))
        tables.append("".join(rows))
    every = [cell for cells in shown.values() for cell in cells]
    everyone, made = caption(report, every), f"{made_by(report, every)} ([report](../{where})).\n"
    return "\n".join([*tables, f"![speed-up of each way to decode]({Path(PLOT).name})\n", f"{everyone} {made}"])


def caption(report: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """When, where and with what the cells were measured."""
    from benchmarks.report import NOISY, days

    machine, versions, settings = report["hardware"], report["versions"], report["settings"]
    device = machine.get("gpu") or f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads)"
    dtypes = sorted({cell["dtype"] for cell in cells if "dtype" in cell})
    everyone = f", {' and '.join(dtypes)} unless named" if dtypes else ""
    noisy = f" {NOISY}: most rounds were noisy." if any(cell["doubtful"] for cell in cells) else ""
    return (
        f"{days(report, cells)}, {device}, torch {versions['torch']}, transformers {versions['transformers']}"
        f"{everyone}; {settings['rounds']} interleaved rounds of {max(cell['questions'] for cell in cells)} held-out "
        f"questions, up to {max(cell['new_tokens'] for cell in cells)} new tokens; medians. Speed-up is over the "
        f"strongest plain decoding of the same run, of the whole request with its picture and prompt.{noisy}"
    )


PAGES: Mapping[str, Callable[[Mapping[str, Any], str], str]] = {
    "README.md": readme_block, "docs/speed.md": speed_block,
}  # fmt: skip


def renewed(page: str, repository: Path, report: str | None = None) -> tuple[str, str]:
    """The text of ``page`` with the figures of its report, or of another ``report``; and the path of that report.

    Raises:
        UserError: the markers are missing, or the report cannot be read.
    """
    text = (repository / page).read_text(encoding="utf-8")
    found = BLOCK.search(text)
    if found is None:
        raise UserError("page has no markers for its figures", page, "put `<!-- figures: REPORT -->` above the table")
    where = report or found[2]
    block = PAGES[page](read_json(repository / where, "bench report"), where)
    return text[: found.start()] + found[1] + where + found[3] + block + found[5] + text[found.end() :], where


def draw_plot(report: Mapping[str, Any], path: Path, source: str) -> None:
    """The plot of the cells that are shown; ``source`` is the checksum of the report."""
    from benchmarks.plot import draw_compact

    shown = [(cell, f"{name_of(cell)}, {how(t)}") for t, cells in chosen(report).items() for cell in cells]
    draw_compact([cell for cell, _ in shown], [title for _, title in shown], path, source)


def drawn_from(path: Path) -> str | None:
    """The checksum of the report that a plot was drawn from; None if there is no plot."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return str(image.info.get("Source"))


def run(argv: Sequence[str]) -> int:
    """Writes or checks; returns the exit status."""
    parser = OneLineParser(
        prog="python -m benchmarks.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--report", metavar="PATH", help="report, relative to the repository (default: the pages')")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="folder of README.md")
    options = parser.parse_args(argv)
    pages = {page: renewed(page, options.repository, options.report) for page in PAGES}
    where, plot = pages["docs/speed.md"][1], options.repository / PLOT
    source = sha256(options.repository / where)
    if options.check:
        same = all((options.repository / page).read_text(encoding="utf-8") == text for page, (text, _) in pages.items())
        return int(not same or drawn_from(plot) != source)
    draw_plot(read_json(options.repository / where, "bench report"), plot, source)
    for page, (text, _) in pages.items():
        write_text(options.repository / page, text)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda: run(sys.argv[1:])))

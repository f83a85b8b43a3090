"""README's table of speed, from the report that `msd bench` wrote, so that no figure is copied by hand.

    python -m benchmarks.readme            # writes the table into README.md
    python -m benchmarks.readme --check    # exit status 1 if README's table is another one

The table stands between two marks in README.md; the first one names the report.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_cli
from llava.files import atomic_write, read_json

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
MODELS = {"llava": "LLaVA", "qwen2vl": "Qwen2-VL"}
NAMES = {"autoregressive": "our autoregressive loop", "transformers generate": "transformers `generate`"}


def table_of(report: dict[str, Any]) -> str:
    """The Markdown table: baselines from slow to fast, then MSD. The strongest baseline is 1."""
    best = report["tokens_per_second"]["baseline"]
    folder, sampling = Path(report["settings"]["base_model"]).name, report["settings"]["temperature"]
    place = report["hardware"].get("gpu") or f"{report['hardware']['cores']} CPU cores"
    how = "greedy" if sampling == 0 else f"T = {sampling:g}"
    lines = [
        f"| pocket {MODELS.get(folder, folder)}, {place}, {how} | tokens/s | τ | speed-up |",
        "|---|---:|---:|---:|",
    ]
    for name, speed in sorted(report["baselines"].items(), key=lambda item: item[1]):
        kind, _, dtype = name.rpartition(" ")
        note = " (the strongest baseline)" if name == report["baseline_name"] else ""
        lines.append(f"| {NAMES.get(kind, kind)}, {dtype}{note} | {speed:.0f} | | {speed / best:.2f}x |")
    own = report["tokens_per_second"]["msd"]
    dtype = next(iter(report["baselines"])).rpartition(" ")[2]  # the first is in MSD's own
    lines.append(f"| MSD, {dtype} | {own:.0f} | {report['tau']:.2f} | **{report['speedup']:.2f}x** |")
    return "\n".join(lines) + "\n"


def renewed(text: str, repository: Path) -> str:
    """README's ``text`` with the table as its report has it.

    Raises:
        UserError: the marks are missing, or the report cannot be read.
    """
    found = BLOCK.search(text)
    if found is None:
        raise UserError("README has no marks for its figures", fix="put them around the table")
    table = table_of(read_json(repository / found[2], "bench report"))
    return text[: found.start()] + found[1] + table + found[4] + text[found.end() :]


def run(argv: Sequence[str]) -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="folder of README.md")
    options = parser.parse_args(argv)
    page = options.repository / "README.md"
    text = page.read_text(encoding="utf-8")
    wanted = renewed(text, options.repository)
    if options.check:
        return int(wanted != text)
    with atomic_write(page) as temporary:
        temporary.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda: run(sys.argv[1:])))

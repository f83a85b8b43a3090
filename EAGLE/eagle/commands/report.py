"""Put results side by side: which settings differ, and which differences are larger than the runs' spread.

Takes the JSON files of `msd bench` (with --server too), of the benchmark suite, of gpu_check and of training runs with
--eval-data, and results of lmms-eval (a file, or a folder with one below it). Others are compared with the first run.
Published figures of the same base model and kind of draft are shown in a table of their own, never mixed into the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eagle.commands.output import console
from llava.files import check_writable, write_json

if TYPE_CHECKING:
    from eagle.published import Published
    from eagle.report.runs import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd report`."""
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help="results of runs")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="also write the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="also write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="also write a page with plots")
    parser.add_argument(
        "--published", choices=("same", "all", "none"), default="same",
        help="published figures to show: of the same base and kind of draft (default), all of them, or none",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Prints the tables; writes the files that were asked for."""
    from rich.table import Table
    from rich.text import Text

    from eagle.report import compare
    from eagle.report.runs import read_run

    for path in (arguments.markdown, arguments.json, arguments.html):
        if path:
            check_writable(path)
    runs = [read_run(path) for path in arguments.results]
    out = console()
    for line in compare.notes(runs):
        out.print(line, highlight=False, markup=False)
    for title, (header, rows) in compare.tables(runs).items():
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        out.print(table, markup=False)
    published = published_for(runs, arguments.published)
    if published:
        header, rows = compare.published_table(published, runs)
        table = Table(*header, title=compare.PUBLISHED, title_justify="left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        out.print(table)
        for line in compare.published_notes(published):
            out.print(line, highlight=False, markup=False)
    if arguments.markdown:
        compare.write_markdown(runs, arguments.markdown, published)
    if arguments.json:
        write_json(arguments.json, compare.as_json(runs, published))
    if arguments.html:
        compare.write_html(runs, arguments.html, published)
    return 0


def published_for(runs: Sequence[Run], which: str) -> list[Published]:
    """The published rows to show beside ``runs``; none, with a line that says so, where there is no clone.

    Raises:
        UserError: ``which`` is ``all`` and there is no clone.
    """
    from eagle.published import PUBLISHED, published_rows

    if which == "none":
        return []
    if which == "same" and not PUBLISHED.exists():
        print(f"no published figures: {PUBLISHED} is in a clone only", file=sys.stderr)
        return []
    return [
        row
        for row in published_rows()
        if which == "all" or any(row.is_of(run.settings.get("base", ""), run.settings.get("draft", "")) for run in runs)
    ]

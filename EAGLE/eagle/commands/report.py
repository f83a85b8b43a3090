"""Put results side by side: which settings differ, and which differences are larger than the runs' spread.

Takes the JSON files of `msd bench` (with --server too), of the benchmark suite, of gpu_check and of training runs with
--eval-data, and results of lmms-eval (a file, or a folder with one below it). Others are compared with the first run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle.commands.output import console
from llava.files import check_writable, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd report`."""
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help="results of runs")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="also write the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="also write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="also write a page with plots")


def run(arguments: argparse.Namespace) -> int:
    """Prints the tables; writes the files that were asked for."""
    from rich.table import Table

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
    if arguments.markdown:
        compare.write_markdown(runs, arguments.markdown)
    if arguments.json:
        write_json(arguments.json, compare.as_json(runs))
    if arguments.html:
        compare.write_html(runs, arguments.html)
    return 0

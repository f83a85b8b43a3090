"""Compare all contestants of a suite file, cell by cell, in interleaved rounds.

    python -m benchmarks.suite                                   # benchmarks/suites/pocket.json
    python -m benchmarks.suite --only long --rounds 9            # cells whose name has 'long'
    python -m benchmarks.suite --missing                         # cells that the report lacks, as declared
    python -m benchmarks.suite --quick                           # a minute, to see that it runs

Leaves OUT/NAME.json, written after every cell, and OUT/NAME.png; prints one table. docs/speed.md says how to read them.
With some of the cells, the others of an existing report are kept, if settings, machine and versions are the same. Each
cell has its own date, commit and command. A run of all cells begins a new report.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle.arguments import positive
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import read_object, write_json

if TYPE_CHECKING:
    from benchmarks.spec import Cell, Pair, Suite
    from eagle.decode.msd import MSDModel

PLAIN_WIDTH = 150  # of the table where it goes to a file
SUITES = Path(__file__).resolve().parent / "suites"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = OneLineParser(
        prog="python -m benchmarks.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--suite", type=Path, default=SUITES / "pocket.json", help="suite file (default: the pocket models)")
    add("--quick", action="store_true", help="the smoke test's suite file")
    add("--only", metavar="TEXT", help="cells whose name has this text")
    add(
        "--missing",
        action="store_true",
        help="cells that the report in --out does not have as they are declared",
    )
    add("--rounds", type=positive, help="counted rounds, instead of the suite's")
    add("--assistant", metavar="layers:N|PATH", help="assistant of transformers' assisted decoding, not the suite's")
    add("--out", type=Path, default=Path("outputs/bench"), help="folder of the report (default: outputs/bench)")
    add("--list", action="store_true", help="print the cells and stop")
    return made


def run(argv: Sequence[str]) -> int:
    """Measures; returns the exit status."""
    options = parser().parse_args(argv)
    from rich.console import Console

    from benchmarks.plot import draw
    from benchmarks.report import continued, header, phase_table, table_of
    from benchmarks.spec import read_suite
    from eagle.provenance import now
    from eagle.report.runs import kind_of

    suite = read_suite(SUITES / "quick.json" if options.quick else options.suite)
    given = {"rounds": options.rounds, "assistant": options.assistant}
    suite = replace(suite, **{name: value for name, value in given.items() if value is not None})
    cells = [cell for cell in suite.cells if options.only is None or options.only in cell.name]
    if not cells:
        raise UserError(f"no cell of the suite has '{options.only}' in its name", suite.where, "see --list")
    if options.list:
        print("\n".join(cell.title for cell in cells))
        return 0
    path = options.out / f"{suite.name}.json"
    earlier = read_object(path, "bench report") if path.is_file() else {"cells": []}
    if path.is_file() and kind_of(earlier) != "suite":
        raise UserError("not a report of the suite", path, "another --out")
    if not all(isinstance(cell, dict) and "title" in cell for cell in earlier["cells"]):
        raise UserError("a cell of the report has no title", path, "another --out")
    found = {cell["title"] for cell in earlier["cells"]}
    if options.missing:
        cells = [cell for cell in cells if not any(declares(cell, each) for each in earlier["cells"])]
    report = earlier
    places = {cell.title: place for place, cell in enumerate(suite.cells)}
    loaded: dict[str, list[MSDModel]] = {}
    for number, cell in enumerate(cells):
        if cell.model not in loaded:
            loaded = {cell.model: load(suite.models[cell.model], suite)}  # one pair in memory at a time
        models = loaded[cell.model]
        if number == 0:
            report = header(suite, models[0].device, "benchmarks.suite", argv)
            if (options.only or options.missing) and found - {each.title for each in cells}:
                report["cells"] = continued(report, earlier, path)
        row = {**measure(cell, suite, models), "date": now(), "commit": report["commit"], "command": report["command"]}
        others = [each for each in report["cells"] if each["title"] != cell.title]
        report["cells"] = sorted([*others, row], key=lambda each: places.get(each["title"], len(places)))
        write_json(path, report, indent=1)
    draw(report, options.out / f"{suite.name}.png")
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    console.print(table_of(report), phase_table(report))
    return 0


def declares(cell: Cell, row: Mapping[str, Any]) -> bool:
    """Whether a cell of a report was measured as the suite declares it now: its questions, contestants and so on."""
    declared = json.loads(json.dumps(asdict(cell)))
    return row["title"] == cell.title and all(row.get(key, value) == value for key, value in declared.items())


def load(pair: Pair, suite: Suite) -> list[MSDModel]:
    """The pair in the suite's dtype, then its base in the dtypes of further baselines."""
    import torch

    from benchmarks.random_pair import random_pair
    from eagle.decode.msd import MSDModel
    from eagle.loading import device_map_for
    from llava.device import dtype_for

    place = device_map_for(suite.device_map)
    if pair.random is not None:
        device = torch.accelerator.current_accelerator() if place != "cpu" else torch.device("cpu")
        dtype = dtype_for(suite.dtype, place)
        dtype = torch.bfloat16 if dtype == "auto" else dtype
        return [random_pair(pair.random, named(dtype), device or torch.device("cpu"))]
    first = MSDModel.from_pretrained(str(pair.base), pair.draft, dtype=named(suite.dtype), device_map=place)
    others = [name for name in suite.baseline_dtypes if named(name) != first.dtype and not too_slow(name, place)]
    return [first, *(MSDModel.from_pretrained(str(pair.base), dtype=named(name), device_map=place) for name in others)]


def too_slow(dtype: str, place: str) -> bool:
    """16 bit on a CPU without 16-bit products is many times slower, so it is left out as a baseline."""
    from llava.device import cpu_has_bfloat16, on_cpu

    return dtype != "float32" and on_cpu(place) and not cpu_has_bfloat16()


def named(dtype: Any) -> Any:
    """A dtype by its name; 'auto' stays."""
    import torch

    return getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype


def measure(cell: Cell, suite: Suite, models: Sequence[MSDModel]) -> dict[str, Any]:
    """Runs one cell."""
    from benchmarks.contestants import build
    from benchmarks.report import row_of_cell
    from benchmarks.work import work_of
    from eagle.benchmark import interleave_with_bar

    random = suite.models[cell.model].random is not None
    work = work_of(cell, suite, models[0], random)
    runners, left_out = build(cell, suite, models[0], models[1:])
    left_out |= {
        f"plain baselines in {dtype}": "this CPU has no products in this dtype"
        for dtype in suite.baseline_dtypes
        if not random and named(dtype) != models[0].dtype and too_slow(dtype, str(models[0].device))
    }
    loads = []
    for number in interleave_with_bar(runners, [work] * suite.rounds, suite.warm_up, cell.title):
        if number >= 0:
            loads.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
    row = row_of_cell(cell, runners, left_out, suite, loads, random)
    return row | {"dtype": str(models[0].dtype).removeprefix("torch.")}


if __name__ == "__main__":
    sys.exit(run_cli(lambda: run(sys.argv[1:]), "the report has the cells that were measured"))

"""What each saving in the cycle gains: the engine as it is against itself with one of them taken back.

    python -m experiments.savings                                    # the pocket LLaVA pair
    python -m experiments.savings --base-model B --msd-model D --data questions.jsonl --out FILE.json

All ways answer the same questions in interleaved rounds with the same fixed tree, and give the same tokens. Shown is
the median time of a cycle, and of the prefill, as it is and without the saving.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.rounds import Runner, find_quiet, interleave_rounds
from eagle.arguments import positive
from eagle.benchmark import Answer, Work, with_engine
from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.questions import read_questions
from experiments.ablations import WAYS
from experiments.steps import about, told
from llava.errors import UserError, run_cli
from llava.files import atomic_write

AS_IT_IS = "as it is"


def cycle_ms(stats: Stats) -> float:
    """Milliseconds of a cycle."""
    return 1000 * stats.loop / stats.cycles


def prefill_ms(stats: Stats) -> float:
    """Milliseconds of a prompt."""
    return stats.phases_ms["prefill"] / stats.requests


def contestants(pair: MSDModel, tokens: int) -> list[Runner]:
    """The engine as it is, then without each saving."""
    settings = {"max_new_tokens": tokens, "temperature": 0.0}
    decode = with_engine(pair, True, settings)

    def within(change: AbstractContextManager[None]) -> Any:
        def answer(work: Work) -> Answer:
            with change:
                return decode(work)

        return answer

    return [Runner(AS_IT_IS, decode), *(Runner(name, within(way(pair))) for name, way in WAYS.items())]


def measure(pair: MSDModel, work: Sequence[Work], tokens: int, rounds: int, tolerance: float) -> list[dict[str, Any]]:
    """One record for each way.

    Raises:
        UserError: ways give different tokens.
    """
    runners = contestants(pair, tokens)
    with tqdm(total=rounds + 1, unit="round", file=sys.stderr) as bar:
        for _ in interleave_rounds(runners, work, 1, rounds):
            bar.update()
    for runner in runners:
        if runner.tokens != runners[0].tokens:
            raise UserError(f"without '{runner.name}' the answers are others", fix="this is a defect: report it")
    quiet = find_quiet(runners, tolerance)
    records: list[dict[str, Any]] = []
    for runner in runners:
        cycle, prefill = (runner.median(value, quiet.rounds) for value in (cycle_ms, prefill_ms))
        spread = runner.spread(cycle_ms, quiet.rounds)
        records.append({"saving": runner.name, "cycle_ms": cycle, "spread": spread, "prefill_ms": prefill})
    for record in records:
        record["rounds"], record["doubtful"] = len(quiet.rounds), quiet.doubtful
        record["gain"] = record["cycle_ms"] / records[0]["cycle_ms"]
        record["prefill_gain"] = record["prefill_ms"] / records[0]["prefill_ms"]
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """For people."""
    shown = Table("saving", "cycle without it", "gain", "prefill without it", "gain", "spread")
    for record in records:
        shown.add_row(
            record["saving"],
            f"{record['cycle_ms']:.2f} ms", f"{record['gain']:.2f}x",
            f"{record['prefill_ms']:.1f} ms", f"{record['prefill_gain']:.2f}x", f"{record['spread']:.0%}",
        )  # fmt: skip
    return shown


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-model", default="pocket/llava")
    add("--msd-model", default="pocket/llava-msd")
    add("--data", type=Path, default=Path("pocket/data/heldout.jsonl"))
    add("--questions", type=positive, default=4)
    add("--max-new-tokens", type=positive, default=96)
    add("--rounds", type=positive, default=9)
    add("--tolerance", type=float, default=0.15, help="a round that deviates more from the median is noisy")
    add("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    """Measures, prints, writes."""
    options = parse(argv)
    work = list(read_questions(options.data))[: options.questions]
    pair = MSDModel.from_pretrained(options.base_model, options.msd_model, tree="fixed")
    records = measure(pair, work, options.max_new_tokens, options.rounds, options.tolerance)
    record = about()
    console = Console()
    console.print(table(records))
    noisy = ", noisy" if records[0]["doubtful"] else ""
    console.print(f"tree {pair.tree}, {records[0]['rounds']} quiet rounds{noisy}\n{told(record)}")
    if options.out is not None:
        with atomic_write(options.out) as temporary:
            temporary.write_text(json.dumps({**record, "tree": str(pair.tree), "ways": records}, indent=1) + "\n")
    return 0


def main() -> int:
    """Entry point."""
    return run_cli(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())

"""Never slower: the default beside processes that keep a core busy, against plain decoding under the same load.

    python -m experiments.neighbour [--loads 0,1,2,0] [--questions 12] [--out FILE.json]

For each load, so many processes count in a loop. Each question is answered plainly and by MSD in turn. A window is 32
consecutive cycles of MSD's answers; its ratio is the time that its tokens take plainly, at the plain speed of the same
questions, over its own time. Times are those after the first token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from experiments.common import REPO, parser, run_record
from llava.errors import UserError, run_cli
from llava.files import write_json

if TYPE_CHECKING:
    from eagle.decode.msd import MSDModel

WINDOW = 32


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("experiments.neighbour", __doc__)
    add = made.add_argument
    add("--base", default="pocket/llava", help="base model (default: pocket/llava)")
    add("--draft", default="pocket/llava-msd", help="draft (default: pocket/llava-msd)")
    add("--data", default="pocket/data/heldout.jsonl", help="questions (default: the pocket models')")
    add("--questions", type=int, default=12, help="questions under each load (default: 12)")
    add("--new-tokens", type=int, default=96, help="new tokens of an answer at most (default: 96)")
    add("--loads", default="0,1,2,0", help="numbers of busy processes, one after the other (default: 0,1,2,0)")
    return made.parse_args(argv)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that keep a core busy each."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


class Clock:
    """A streamer that keeps (moment, tokens) of each cycle; the first is the prefill's token."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def put(self, ids: Any) -> None:
        """The prompt."""

    def put_cycle(self, tokens: list[int], accepted: int) -> None:
        self.marks.append((time.perf_counter(), len(tokens)))

    def end(self) -> None:
        """The end of the answer."""

    def cycles(self) -> list[tuple[float, int]]:
        """(seconds, tokens) of each cycle."""
        return [(end - start, tokens) for (start, _), (end, tokens) in zip(self.marks, self.marks[1:], strict=False)]


def under_load(model: MSDModel, works: Sequence[Any], new_tokens: int) -> dict[str, Any]:
    """Ratios of all windows of MSD's answers."""
    cycles: list[tuple[float, int, float]] = []  # seconds, tokens, plain seconds of a token
    for work in works:
        clocks = []
        for use_msd in (False, True):
            clock = Clock()
            settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": new_tokens, "streamer": clock}
            model.generate(**work.inputs(model.target), use_msd=use_msd, **settings)
            clocks.append(clock.cycles())
        plain, own = clocks
        token = sum(seconds for seconds, _ in plain) / max(1, sum(tokens for _, tokens in plain))
        cycles += [(seconds, tokens, token) for seconds, tokens in own]
    windows = [cycles[start : start + WINDOW] for start in range(0, len(cycles) - WINDOW + 1, WINDOW)]
    ratios = [sum(n * token for _, n, token in part) / sum(seconds for seconds, _, _ in part) for part in windows]
    if not ratios:
        raise UserError(f"{len(cycles)} cycles, a window has {WINDOW}", fix="ask more --questions")
    plain_ms = 1e3 * sum(token for _, _, token in cycles) / len(cycles)
    return {"windows": [round(ratio, 2) for ratio in ratios], "least": round(min(ratios), 2), "plain_ms": plain_ms}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parse_args(argv)
    from eagle.decode.msd import MSDModel
    from eagle.questions import read_questions

    model = MSDModel.from_pretrained(str(REPO / options.base), str(REPO / options.draft), dtype="auto")
    questions = read_questions(REPO / options.data, options.questions * 4)
    for work in questions[:2]:  # costs are measured, and acceptance is learnt
        model.generate(**work.inputs(model.target), temperature=0.0, max_new_tokens=options.new_tokens)
    rows = []
    for place, load in enumerate(map(int, options.loads.split(","))):
        start = place % 4 * options.questions
        with busy(load):
            row = {"load": load, **under_load(model, questions[start : start + options.questions], options.new_tokens)}
        rows.append(row)
        print(
            f"{load} busy: least {row['least']}x, plain {row['plain_ms']:.1f} ms a token, windows {row['windows']}",
            flush=True,
        )
    if options.out is not None:
        write_json(options.out, {"run": run_record(options), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Never slower: MSD beside processes that keep a core busy, against the strongest plain decoding under the same load.

    python -m experiments.neighbour [--loads 0,1,2,0] [--questions 12] [--compile] [--out FILE.json]

For each load, so many processes count in a loop. Each question is answered by MSD and by all plain ways in turn: our
loop and transformers' `generate`, both compiled too if the model can be. Compiling and a warm-up come before. The
baseline is the strongest plain way after the first token under this load. A window is 32 consecutive cycles of MSD's
answers; its ratio is the time that its tokens take plainly, at the plain speed of the same questions, over its own
time. Times are those after the first token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from experiments.common import REPO, parser, run_record
from llava.errors import UserError, run_cli
from llava.files import write_json

if TYPE_CHECKING:
    from eagle.benchmark import Answer, Contestant, Work
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
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="compile MSD (default: MSD is not compiled)")
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


def with_clock(
    model: MSDModel, settings: dict[str, Any], log: list[list[tuple[float, int]]]
) -> Callable[[Work], Answer]:
    """Decodes with MSD and appends (seconds, tokens) of each cycle of an answer to ``log``."""
    from eagle.benchmark import Answer

    def answer(work: Work) -> Answer:
        clock = Clock()
        output = model.generate(**work.inputs(model.target), streamer=clock, **settings)
        log.append(clock.cycles())
        return Answer(output.stats, output.tokens)

    return answer


def under_load(
    msd: Contestant, rivals: Sequence[Contestant], log: list[list[tuple[float, int]]], works: Sequence[Work]
) -> dict[str, Any]:
    """Ratios of all windows of MSD's answers over the strongest of ``rivals``. ``log``: of `with_clock`."""
    from eagle.benchmark import decoding_speed, interleave, strongest

    msd, *plain = (each.part([]) for each in (msd, *rivals))
    log.clear()
    for _ in interleave([msd, *plain], [[work] for work in works], warm_up=0):
        pass
    best = strongest(plain, decoding_speed)
    cycles: list[tuple[float, int, float]] = []  # seconds, tokens, plain seconds of a token
    for answer, stats in zip(log, best.rounds, strict=True):
        token = stats.decoding_seconds / max(1, stats.new_tokens - 1)
        cycles += [(seconds, tokens, token) for seconds, tokens in answer]
    windows = [cycles[start : start + WINDOW] for start in range(0, len(cycles) - WINDOW + 1, WINDOW)]
    ratios = [sum(n * token for _, n, token in part) / sum(seconds for seconds, _, _ in part) for part in windows]
    if not ratios:
        raise UserError(f"{len(cycles)} cycles, a window has {WINDOW}", fix="ask more --questions")
    return {
        "windows": [round(ratio, 2) for ratio in ratios],
        "least": round(min(ratios), 2),
        "baseline": best.name,
        "plain_ms": {each.name: 1e3 / each.total.decoding_speed for each in plain},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parse_args(argv)
    from eagle.benchmark import Contestant, baselines, interleave
    from eagle.decode.compiled.engine import obstacle
    from eagle.decode.msd import MSDModel
    from eagle.questions import read_questions

    pair = str(REPO / options.base), str(REPO / options.draft)
    model = MSDModel.from_pretrained(*pair, dtype="auto", compile=options.compile or False)
    questions = read_questions(REPO / options.data, options.questions * 4)
    settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": options.new_tokens}
    log: list[list[tuple[float, int]]] = []
    model.warm_up()
    msd = Contestant("MSD", with_clock(model, settings, log))
    rivals = baselines([model], settings, compiled=obstacle(model.target) is None)
    for _ in interleave([msd, *rivals], [[work] for work in questions[:2]], warm_up=0):  # also learns acceptance
        pass
    rows = []
    for place, load in enumerate(map(int, options.loads.split(","))):
        start = place % 4 * options.questions
        with busy(load):
            row = {"load": load, **under_load(msd, rivals, log, questions[start : start + options.questions])}
        rows.append(row)
        times = ", ".join(f"{name} {ms:.1f}" for name, ms in row["plain_ms"].items())
        print(f"{load} busy: least {row['least']}x over {row['baseline']}, windows {row['windows']}", flush=True)
        print(f"  plain, ms a token: {times}", flush=True)
    if options.out is not None:
        write_json(options.out, {"run": run_record(options), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

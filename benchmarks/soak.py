"""Many generations in one process: memory stays flat, and every greedy answer stays the plain one.

    python -m benchmarks.soak --generations 2000 --out benchmarks/soak.json

Six kinds of request take turns: text, one picture, several pictures, a long prompt, sampling, and a batch. Each draws
from a fixed pool of prompts, whose plain greedy answers are made first. Resident memory is read after each request; its
slope is the least-squares line over the requests after the warm-up. The report and a plot beside it are rewritten every
``--every`` requests, so an interrupted run leaves what it has measured. Status 1: an answer differs, or
memory grows faster than ``--max-slope``.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from eagle.arguments import (
    add_data_options,
    add_length_option,
    add_model_options,
    positive,
    use_pocket_defaults,
)
from eagle.questions import Question, read_questions
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import atomic_write, write_json

if TYPE_CHECKING:
    from eagle.decode.msd import MSDModel

KINDS = ("text", "picture", "pictures", "long", "sampled", "batch")
MIB = 2**20
POOL = 12  # prompts of each kind
BATCH = 3
PICTURES = 3  # of a request with several
WARM_UP = 0.1  # of the requests, not in the fit


@dataclass(frozen=True)
class Prompt:
    """A written prompt with its pictures."""

    text: str
    images: tuple[Path, ...] = ()


@dataclass
class Record:
    """What was measured. ``rss``: resident bytes after each request; ``differing``: requests whose greedy answer was
    different from the plain one."""

    rss: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    differing: list[int] = field(default_factory=list)
    new_tokens: int = 0
    cycles: int = 0
    requests: int = 0
    cut_trees: int = 0
    seconds: float = 0.0


class Soak:
    """The requests, and the plain answers that they are compared with."""

    def __init__(self, model: MSDModel, questions: Sequence[Question], length: int, long: int, seed: int) -> None:
        self.model, self.length, self.seed = model, length, seed
        self.random = random.Random(seed)
        self.pools = make_pools(model, questions, long)
        self.expected: dict[Prompt, list[int]] = {}
        self.record = Record()

    def prepare(self) -> None:
        """The plain greedy answer to each prompt of the pools."""
        from rich.progress import track

        prompts = dict.fromkeys(prompt for pool in self.pools.values() for prompt in pool)
        for prompt in track(prompts, description="plain answers"):
            (self.expected[prompt],) = self.answers([prompt], use_msd=False, temperature=0.0)

    def request(self, number: int) -> None:
        """One request; memory is read after it."""
        kind = KINDS[number % len(KINDS)]
        prompts = [self.random.choice(self.pools[kind]) for _ in range(BATCH if kind == "batch" else 1)]
        if kind == "sampled":
            self.answers(prompts, temperature=0.8, top_p=0.95, seed=self.seed + number)
        else:
            got = self.answers(prompts, temperature=0.0)
            self.record.compared += len(prompts)
            if got != [self.expected[prompt] for prompt in prompts]:
                self.record.differing.append(number)
        self.record.kinds[kind] += 1
        self.record.rss.append(psutil.Process().memory_info().rss)

    def answers(self, prompts: Sequence[Prompt], **settings: Any) -> list[list[int]]:
        """New tokens for each prompt, up to the end token."""
        target = self.model.target
        texts = [prompt.text for prompt in prompts]
        inputs = target.prepare(
            texts if len(texts) > 1 else texts[0], [image for prompt in prompts for image in prompt.images]
        )
        output = self.model.generate(**inputs, max_new_tokens=self.length, **settings)
        stats = output.stats
        self.record.new_tokens += stats.new_tokens
        self.record.cycles += stats.cycles
        self.record.requests += stats.requests
        self.record.cut_trees += stats.cut_trees
        return output.tokens


def make_pools(model: MSDModel, questions: Sequence[Question], long: int) -> dict[str, list[Prompt]]:
    """`POOL` prompts of each kind; a long one repeats a sentence until it has about ``long`` tokens."""
    with_picture = [question for question in questions if question.images][:POOL]
    if not with_picture:
        raise UserError("no question with a picture", fix="name another file with --data")
    chat = model.target.chat_prompt
    pictures = [question.images[0] for question in with_picture]
    pools: dict[str, list[Prompt]] = {kind: [] for kind in KINDS}
    for place, question in enumerate(with_picture):
        several = tuple(pictures[(place + step) % len(pictures)] for step in range(2 + place % (PICTURES - 1)))
        once = len(model.tokenizer(question.question, add_special_tokens=False)["input_ids"])
        repeated = " ".join([question.question] * max(1, long // max(1, once)))
        pools["text"].append(Prompt(chat(question.question)))
        pools["picture"].append(Prompt(chat(question.question, num_images=1), question.images[:1]))
        pools["pictures"].append(Prompt(chat(question.question, num_images=len(several)), several))
        pools["long"].append(Prompt(chat(repeated)))
    pools["sampled"] = pools["picture"]
    pools["batch"] = pools["text"] + pools["picture"] + pools["pictures"]
    return pools


def slope(rss: Sequence[int]) -> dict[str, float]:
    """The least-squares line of memory over requests, those of the warm-up left out.

    Returns:
        ``mib_per_1000`` growth for each 1 000 requests, ``standard_error`` of it, ``start_mib`` the line at its first
        request, ``first`` number of that request.
    """
    first = int(len(rss) * WARM_UP)
    place, memory = np.arange(first, len(rss), dtype=float), np.asarray(rss[first:], dtype=float) / MIB
    if len(place) < 3:
        raise UserError(f"a line through {len(place)} requests", fix="give more --generations")
    centred = place - place.mean()
    spread = float((centred**2).sum())
    rise = float((centred * memory).sum()) / spread
    residuals = memory - memory.mean() - rise * centred
    error = float(np.sqrt((residuals**2).sum() / (len(place) - 2) / spread))
    start = float(memory.mean() + rise * centred[0])
    return {"mib_per_1000": rise * 1000, "standard_error": error * 1000, "start_mib": start, "first": first}


def report(soak: Soak, arguments: argparse.Namespace) -> dict[str, Any]:
    from eagle.provenance import hardware, versions

    record = soak.record
    return {
        "generations": len(record.rss),
        "kinds": dict(record.kinds),
        "greedy_answers_compared": record.compared,
        "requests_with_another_answer": record.differing,
        "tau": (record.new_tokens - record.requests) / record.cycles if record.cycles else 0.0,
        "trees_cut_for_memory": record.cut_trees,
        "seconds": record.seconds,
        "slope": slope(record.rss),
        "peak_mib": round(max(record.rss) / MIB, 2),
        "rss_mib": [round(value / MIB, 2) for value in record.rss],
        "device": str(soak.model.device),
        "hardware": hardware(soak.model.device),
        "versions": versions(),
        "settings": {
            "base_model": Path(arguments.base_model).name, "msd_model": Path(arguments.msd_model).name,
            "dtype": str(soak.model.dtype), "max_new_tokens": soak.length, "seed": soak.seed,
            "tree": str(soak.model.tree), "pool": POOL, "batch": BATCH, "warm_up": WARM_UP,
        },
    }  # fmt: skip


def write(found: dict[str, Any], out: Path) -> None:
    """The report, and the plot of its memory beside it."""
    from matplotlib.figure import Figure

    write_json(out, found, indent=1)
    line, rss = found["slope"], found["rss_mib"]
    figure = Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    axes.plot(range(len(rss)), rss, linewidth=0.8, label="resident memory")
    ends = [line["first"], len(rss) - 1]
    axes.plot(
        ends,
        [line["start_mib"] + line["mib_per_1000"] / 1000 * (place - line["first"]) for place in ends],
        label=f"{line['mib_per_1000']:+.2f} MiB for 1 000 generations",
    )
    axes.set(xlabel="generation", ylabel="MiB", ylim=(0, None))
    axes.legend(loc="lower right")
    with atomic_write(out.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=100, format="png", bbox_inches="tight")


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    add_model_options(made, dtype="float32", required=False)
    add_data_options(made, required=False)
    add_length_option(made, default=32)
    made.add_argument("--generations", type=positive, default=2000)
    made.add_argument("--long-tokens", type=positive, default=700, help="length of a long prompt (default: 700)")
    made.add_argument("--every", type=positive, default=100, help="requests between two reports (default: 100)")
    made.add_argument(
        "--max-slope", type=float, default=8.0, help="MiB for 1 000 generations that still count as flat (default: 8)"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("outputs/soak.json"), help="the plot lies beside it, as .png")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = parser().parse_args(argv)
    import torch

    use_pocket_defaults(arguments)
    with torch.no_grad():
        return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Measures; returns the exit status."""
    from eagle.loading import load_model

    model = load_model(arguments)
    soak = Soak(
        model, read_questions(arguments.data, arguments.limit), arguments.max_new_tokens, arguments.long_tokens,
        arguments.seed,
    )  # fmt: skip
    soak.prepare()
    soak.record = Record()
    began = time.perf_counter()
    for number in range(arguments.generations):
        soak.request(number)
        if (number + 1) % arguments.every == 0 or number + 1 == arguments.generations:
            soak.record.seconds = time.perf_counter() - began
            found = report(soak, arguments)
            write(found, arguments.out)
            print(
                f"{number + 1}/{arguments.generations}: {found['rss_mib'][-1]:.0f} MiB, "
                f"{found['slope']['mib_per_1000']:+.2f} MiB for 1 000, {len(soak.record.differing)} differing answers",
                flush=True,
            )
    flat = found["slope"]["mib_per_1000"] <= arguments.max_slope
    return int(bool(soak.record.differing) or not flat)


if __name__ == "__main__":
    sys.exit(run_cli(main))

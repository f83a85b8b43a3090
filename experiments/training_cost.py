"""What the head costs in training: masked rows through lm_head in chunks (ours) against all logits at once.

    python -m experiments.training_cost --data pocket/build/draft-llava
    python -m experiments.training_cost --vocab 152064 --positions 2048 --hidden 3584 --rounds 3 --steps 1

The first trains the pocket draft on stored hidden states (of pocket/recipe/train_draft.sh). The second has a random
head of a real size alone: loss and gradient of one sample, of whose positions --answer-share are in an answer. Both
ways take turns in one process, so that a slow minute slows both; peak memory is that of a step in a process of its own:
resident memory, or torch.cuda.max_memory_allocated on a GPU. The same loss and gradient come out of both ways
(tests/experiments/test_training_cost.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.peak_memory import peak_bytes, reset_peak, resident_bytes
from experiments.steps import about, environment, told
from experiments.training_work import WAYS, work_of
from llava.errors import UserError, run_cli
from llava.files import write_json

MIB = 2**20


def main() -> None:
    """Throughput of both ways in turns, then the peak of each alone."""
    options = parse_args()
    if options.worker:
        print(json.dumps(measure_peak(options)))
        return
    speeds = measure_speeds(options)
    peaks = {way: peak_of(way) for way in WAYS}
    settings = {key: value for key, value in vars(options).items() if key not in ("worker", "out")}
    record = {**about(), "settings": json.loads(json.dumps(settings, default=str)), "ways": {}}
    for way in WAYS:
        middle = statistics.median(speeds[way])
        record["ways"][way] = {"samples_per_second": middle, "rounds": speeds[way], **peaks[way]}
    print(table(record))
    if options.out:
        write_json(options.out, record)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    model = parser.add_argument_group("training of a draft")
    model.add_argument("--data", type=Path, metavar="FOLDER", help="hidden states in FOLDER/hidden_t and hidden_v")
    model.add_argument("--base", default="pocket/llava", help="(default %(default)s)")
    model.add_argument("--config", default="pocket_llava_config.json", help="training config (default %(default)s)")
    model.add_argument("--deepspeed-config", default="pocket_ds_config.json", help="(default %(default)s)")
    head = parser.add_argument_group("a head alone")
    head.add_argument("--vocab", type=int, help="rows of the head: 152064 is Qwen2-VL's, 32000 LLaVA-1.5's")
    head.add_argument("--positions", type=int, default=2048, help="of the sample (default %(default)s)")
    head.add_argument("--hidden", type=int, default=3584, help="hidden size (default %(default)s)")
    head.add_argument("--answer-share", type=float, default=0.3, help="of the positions (default %(default)s)")
    head.add_argument("--chunk", type=int, default=512, help="rows at a time, our way (default %(default)s)")
    head.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default %(default)s)")
    add("--rounds", type=int, default=5, help="turns of each way (default %(default)s)")
    add("--steps", type=int, default=4, help="steps of a turn (default %(default)s)")
    add("--out", type=Path, metavar="FILE.json", help="write the record here")
    add("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.data is None) == (options.vocab is None):
        raise UserError("one thing is measured at a time", fix="give --data or --vocab")
    for name in ("rounds", "steps", "positions", "hidden", "chunk"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}", fix="give a whole number of at least 1")
    return options


def measure_speeds(options: argparse.Namespace) -> dict[str, list[float]]:
    """Samples per second of each turn; one step of each way is not counted."""
    works = {way: work_of(way, options) for way in WAYS}
    for work in works.values():
        seconds_of(work.step, 1, work.device)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.rounds):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            work = works[way]
            seconds = seconds_of(work.step, options.steps, work.device)
            speeds[way].append(options.steps * work.samples / seconds)
    return speeds


def seconds_of(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Time of ``count`` steps."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_of(way: str) -> dict[str, int]:
    """`measure_peak` in a fresh process, which has this one's options."""
    command = [sys.executable, "-m", "experiments.training_cost", *sys.argv[1:], "--worker", way]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise UserError(f"memory of '{way}' could not be measured: status {done.returncode}",
                        fix="a kill means that memory was too small: reduce --positions or --vocab")  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(options: argparse.Namespace) -> dict[str, int]:
    """Bytes before the first step and at the highest moment of two steps (the first makes the optimizer's state)."""
    work = work_of(options.worker, options)
    reset_peak(work.device)
    before = resident_bytes(work.device)
    seconds_of(work.step, 2, work.device)
    return {"before_bytes": before, "peak_bytes": peak_bytes(work.device)}


def table(record: dict[str, Any]) -> str:
    """Markdown; the ratios are ours to the full logits."""
    lines = ["| head | samples/s | lowest to highest | peak, MiB | more than before the step, MiB |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for way, values in record["ways"].items():
        low, high = min(values["rounds"]), max(values["rounds"])
        peak, more = values["peak_bytes"] / MIB, (values["peak_bytes"] - values["before_bytes"]) / MIB
        speed = values["samples_per_second"]
        lines.append(f"| {way} | {speed:.3g} | {low:.3g} to {high:.3g} | {peak:,.0f} | {more:,.0f} |")
    ours, full = (record["ways"][way] for way in WAYS)
    faster = ours["samples_per_second"] / full["samples_per_second"]
    smaller = full["peak_bytes"] / ours["peak_bytes"]
    return "\n".join([*lines, "", f"Ours: {faster:.2f}x the speed, 1/{smaller:.2f} of the peak. {told(record)}."])


if __name__ == "__main__":
    sys.exit(run_cli(main))

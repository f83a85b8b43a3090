"""The loader of training alone: samples a second from shards of random states, in random order as in training.

    python -m experiments.loader --folder DIR [--shards 40] [--size 4] [--read N] [--workers 1] [--out FILE.json]

The shards are written to ``--folder`` first if they are not there, and what is read is read once before the clock
starts, so that disk speed has no part in it. A batch has two samples, as in the published recipe. ``--reused`` makes
batches in memory of earlier ones, as pinned memory is for a GPU; other memory is new each time, and the system has to
clear it. ``--sparse`` writes zeros as states and gives their space on the disk back, so that a hundred shards of 64
samples fit on it; the page cache holds their zeros as it holds other states. ``--read`` takes part of the samples.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal

from experiments.common import parser, run_record
from llava.errors import run_cli
from llava.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VOCABULARY = 32_000
MICRO = 2
MAX_LENGTH = 2048


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("experiments.loader", __doc__)
    add = made.add_argument
    add("--folder", type=Path, required=True, help="folder of the shards")
    add("--shards", type=int, default=40, help="number of shards (default: 40)")
    add("--size", type=int, default=4, help="samples of a shard (default: 4)")
    add("--hidden", type=int, default=4096, help="hidden size (default: 4096)")
    add("--tokens", type=int, default=1300, help="tokens of a sample on average (default: 1300)")
    add("--images", type=int, default=576, help="image tokens of a sample (default: 576)")
    add("--sparse", action="store_true", help="write states of zeros, which take no space on the disk (Linux)")
    add("--read", type=int, help="samples of a pass, chosen at random once (default: all)")
    add("--hidden-dtype", choices=("auto", "int8"), default="auto", help="as in the allocation (default: auto)")
    add("--workers", type=int, default=1, help="threads that load samples (default: 1)")
    add("--reused", action="store_true", help="make batches in memory of earlier ones")
    add("--epochs", type=int, default=3, help="passes over all samples (default: 3)")
    return made.parse_args(argv)


def write_corpus(options: argparse.Namespace) -> None:
    """Writes shards of random states, or of zeros."""
    import torch

    from eagle.hidden_states.shards import Sample, Source, write_shard

    hidden_dtype: Literal["int8"] | None = None if options.hidden_dtype == "auto" else "int8"
    source = Source("llava", "random", None, "bfloat16", options.hidden, VOCABULARY, 0, hidden_dtype=hidden_dtype)
    generator = torch.Generator().manual_seed(0)
    draw = torch.zeros if options.sparse else partial(torch.randn, generator=generator)
    for shard in range(options.shards):
        samples = []
        for number in range(shard * options.size, (shard + 1) * options.size):
            length = options.tokens + int(torch.randint(-200, 201, (), generator=generator)) * options.tokens // 1300
            place = torch.arange(length)
            sample = Sample(
                id=str(number),
                input_ids=torch.randint(1, VOCABULARY, (length,), generator=generator),
                loss_mask=place > options.images + 60,
                image_mask=(place >= 30) & (place < 30 + options.images),
                hidden=draw(length, options.hidden).bfloat16(),
                image_features=draw(options.images, options.hidden).bfloat16(),
            )
            samples.append((number, sample))
        info = write_shard(options.folder, shard * options.size, (shard + 1) * options.size, samples, [], source)
        if options.sparse:
            subprocess.run(["fallocate", "--dig-holes", options.folder / info.file], check=True)


class Reused:
    """In the place of `eagle.train.collate.buffer`: tensors in a ring of memory that is large enough for any batch."""

    def __init__(self, count: int, size: int) -> None:
        import torch

        self.ring, self.lock = deque(torch.zeros(size, dtype=torch.uint8) for _ in range(count)), Lock()

    def __call__(self, size: Sequence[int], dtype: torch.dtype, pin_memory: bool) -> Tensor:
        with self.lock:
            memory = self.ring[0]
            self.ring.rotate(-1)
        return memory[: math.prod(size) * dtype.itemsize].view(dtype).view(tuple(size))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parse_args(argv)
    from eagle.hidden_states.shards import ShardDataset
    from eagle.train import collate
    from eagle.train.dataset import Samples, batches
    from eagle.train.schedule import IMAGE, Item

    if not list(options.folder.glob("rows-*")):
        write_corpus(options)
    data = ShardDataset(options.folder)
    rows = range(len(data)) if options.read is None else random.Random(0).sample(range(len(data)), options.read)
    samples, rates, used = Samples({IMAGE: (data, range(len(data)))}), [], []
    if options.reused:  # two tensors of each batch, and of those that are loaded ahead
        collate.buffer = Reused(2 * (options.workers + 3), MICRO * MAX_LENGTH * options.hidden * 2)  # type: ignore[assignment]
    for epoch in range(options.epochs + 1):
        order = [Item(IMAGE, row, row) for row in rows]
        random.Random(epoch).shuffle(order)
        pieces = [order[start : start + MICRO] for start in range(0, len(order), MICRO)]
        start, processor, tokens = time.perf_counter(), time.process_time(), 0
        settings = {"vocab_size": VOCABULARY, "max_length": MAX_LENGTH, "workers": options.workers}
        for batch in batches(samples, pieces, **settings):  # type: ignore[arg-type]
            tokens += int(batch.hidden[0, -1, 0] != 0)  # touches the batch
        rates.append(len(order) / (time.perf_counter() - start))
        used.append(1000 * (time.process_time() - processor) / len(order))
    figures = {
        "samples_per_second": rates[1:], "median": statistics.median(rates[1:]), "samples": len(rows),
        "processor_ms": used[1:],
    }  # fmt: skip
    print(f"{len(rows)} samples: {figures['median']:.1f} samples/s, each pass {[round(rate, 1) for rate in rates[1:]]}")
    print(f"{statistics.median(used[1:]):.2f} ms of processor time for a sample")
    if options.out is not None:
        write_json(options.out, {"run": run_record(options), **figures})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

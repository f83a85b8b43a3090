"""The measurements of `experiments.training_cost`."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families.base_weights import load_base_tensors
from eagle.hidden_states.shards import ShardDataset
from eagle.train.collate import Batch, collate
from eagle.train.engine import PlainEngine, read_deepspeed_config
from eagle.train.loss import TOP, DraftObjective, Losses, draft_loss
from eagle.train.objective import targets_of
from eagle.train.rollout import rollout_loss_mask
from eagle.train.schedule import IMAGE, TEXT, BatchSizes
from eagle.train.settings import read_config
from experiments.common import caption, environment, run_record
from llava.errors import UserError
from llava.files import write_json

MIB = 2**20
BATCHES = 4  # different batches that take turns
ANSWER_SHARE = 0.3  # of the positions of a random sample
CHUNK = 512  # rows at a time, our way
STATUS = Path("/proc/self/status")
OURS, FULL = "masked, in chunks", "full logits"
WAYS = (OURS, FULL)


def full_logits_loss(
    predicted: Tensor, target: Tensor, loss_mask: Tensor, head: Tensor, *, hidden_weight: float = 1.0,
    token_weight: float = 0.1,
) -> Losses:  # fmt: skip
    """The loss as published: logits of every position at once, the mask afterwards. Same loss and gradient as
    `eagle.train.loss.draft_loss`.

    Args:
        predicted, target: hidden states [..., H].
        loss_mask: positions that contribute to the loss [...].
        head: weight of ``lm_head`` [V, H].
    """
    mask, rows = loss_mask.float(), loss_mask.sum()
    divisor = rows.clamp(min=1)
    hidden = F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(dim=-1)  # [...]
    logits = F.linear(predicted.to(head.dtype), head).float()  # [..., V]
    with torch.no_grad():
        wanted = F.linear(target.to(head.dtype), head).float().softmax(dim=-1)  # [..., V]
        best = logits.topk(TOP, dim=-1).indices  # [..., 3]
        hits = (best == wanted.argmax(dim=-1, keepdim=True)).cumsum(dim=-1)
    token = -(wanted * logits.log_softmax(dim=-1)).sum(dim=-1)  # [...]
    hidden, token = (hidden * mask).sum() / divisor, (token * mask).sum() / divisor
    total = hidden_weight * hidden + token_weight * token
    return Losses(total, hidden.detach(), token.detach(), hits[loss_mask].sum(dim=0), rows)


class FullLogitsObjective(DraftObjective):
    """The training objective with this loss, at all rows of a sample."""

    def forward(self, batch: Batch) -> Losses:
        every, config = replace(batch, loss_mask=torch.ones_like(batch.loss_mask)), self.config
        weights = {"hidden_weight": config.hidden_weight, "token_weight": config.token_weight}
        parts: list[Losses] = []
        for step, rows, predicted in self.predict(every, batch.inputs, config.rollout_steps):
            counted = rollout_loss_mask(batch.loss_mask, step)[rows]
            parts.append(full_logits_loss(predicted, targets_of(batch, step, rows), counted, self.head, **weights))
        shares = [config.rollout_decay**step for step in range(len(parts))]
        total = torch.stack([share * part.total for share, part in zip(shares, parts, strict=True)]).sum()
        return parts[0]._replace(total=total / sum(shares))


@dataclass(frozen=True)
class Work:
    """``step`` does one optimizer step (of a head alone: loss and gradient) over ``samples`` samples."""

    step: Callable[[], None]
    samples: int
    device: torch.device


def work_of(way: str, options: argparse.Namespace) -> Work:
    """The work that the options ask for, done in one of `WAYS`."""
    torch.manual_seed(0)
    return head_work(way, options) if options.data is None else draft_work(way, options)


def draft_work(way: str, options: argparse.Namespace) -> Work:
    """Steps of the plain engine on the first samples of both sets, in turn."""
    draft_config, config = read_config(options.config)
    assert isinstance(draft_config, DraftConfig)
    deepspeed, base = read_deepspeed_config(options.deepspeed_config), load_base_tensors(options.base)
    sizes = BatchSizes.from_deepspeed(deepspeed, 1, where=options.deepspeed_config)
    vocabulary = base.embed.shape[0]
    kind = DraftObjective if way == OURS else FullLogitsObjective
    objective = kind(DraftModel(replace(draft_config, vocab_size=vocabulary)).train(), base, config)
    engine = PlainEngine(objective, config, deepspeed, sizes)
    sets = {name: ShardDataset(options.data / folder) for name, folder in ((TEXT, "hidden_t"), (IMAGE, "hidden_v"))}
    batches = []
    for number in range(BATCHES):
        data = sets[(TEXT, IMAGE)[number % 2]]
        rows = range(number // 2 * sizes.micro, (number // 2 + 1) * sizes.micro)
        batches.append(collate([data[row % len(data)] for row in rows], vocabulary, config.max_length))
    stream = cycle(batches)

    def step() -> None:
        engine.step([next(stream) for _ in range(sizes.accumulation)], config.learning_rate)

    return Work(step, sizes.micro * sizes.accumulation, engine.device)


def head_work(way: str, options: argparse.Namespace) -> Work:
    """Loss and gradient of one sample of random hidden states with the answer at its end, in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = (1, options.positions, options.hidden)
    head = torch.randn(options.vocab, options.hidden, device=device).mul_(options.hidden**-0.5)  # [V, H]
    predicted, target = torch.randn(size, device=device, requires_grad=True), torch.randn(size, device=device)
    first = round(options.positions * (1 - ANSWER_SHARE))
    loss_mask = (torch.arange(options.positions, device=device) >= first)[None]  # [1, S]

    def step() -> None:
        predicted.grad = None
        if way == OURS:
            losses = draft_loss([predicted[loss_mask]], [target[loss_mask]], head, chunk=CHUNK)
        else:
            losses = full_logits_loss(predicted, target, loss_mask, head)
        losses.total.backward()

    return Work(step, 1, device)


def run(options: argparse.Namespace) -> None:
    """Throughput of both ways in turn, then the peak memory of each alone."""
    if options.worker:
        print(json.dumps(measure_peak(options)))
        return
    speeds = measure_speeds(options)
    record = {**run_record(options), "ways": {}}
    for way in WAYS:
        middle = statistics.median(speeds[way])
        record["ways"][way] = {"samples_per_second": middle, "rounds": speeds[way], **peak_of(way)}
    print(table(record))
    if options.out:
        write_json(options.out, record)


def measure_speeds(options: argparse.Namespace) -> dict[str, list[float]]:
    """Samples per second of each turn; one step of each way is not counted."""
    works = {way: work_of(way, options) for way in WAYS}
    for work in works.values():
        seconds_of(work, 1)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.rounds):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            work = works[way]
            speeds[way].append(options.steps * work.samples / seconds_of(work, options.steps))
    return speeds


def seconds_of(work: Work, count: int) -> float:
    """Seconds of ``count`` steps."""
    start = time.perf_counter()
    for _ in range(count):
        work.step()
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    return time.perf_counter() - start


def peak_of(way: str) -> dict[str, int]:
    """`measure_peak` in a new process with the options of this one."""
    command = [sys.executable, "-m", "experiments.training_cost", *sys.argv[1:], "--worker", way]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise UserError(f"memory of '{way}' could not be measured: status {done.returncode}",
                        fix="if it was killed, memory was too small: reduce --positions or --vocab")  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(options: argparse.Namespace) -> dict[str, int]:
    """Bytes before the first step and at the highest moment of two steps (the first makes the optimizer's state)."""
    work = work_of(options.worker, options)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(work.device)
        before = torch.cuda.memory_allocated(work.device)
        seconds_of(work, 2)
        return {"before_bytes": before, "peak_bytes": torch.cuda.max_memory_allocated(work.device)}
    before = process_bytes("VmRSS")
    seconds_of(work, 2)
    return {"before_bytes": before, "peak_bytes": process_bytes("VmHWM")}


def process_bytes(name: str) -> int:
    """``VmRSS`` (resident now) or ``VmHWM`` (highest so far) of this process in bytes. Where /proc is missing, both are
    the highest so far: ``ru_maxrss``, which on Linux starts at the size of the parent process."""
    if STATUS.is_file():
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(record: dict[str, Any]) -> str:
    """Markdown; the ratios compare ours with the full logits."""
    lines = ["| head | samples/s | lowest to highest | peak, MiB | above the start, MiB |", "|---|---:|---:|---:|---:|"]
    for way, values in record["ways"].items():
        low, high = min(values["rounds"]), max(values["rounds"])
        peak, more = values["peak_bytes"] / MIB, (values["peak_bytes"] - values["before_bytes"]) / MIB
        speed = values["samples_per_second"]
        lines.append(f"| {way} | {speed:.3g} | {low:.3g} to {high:.3g} | {peak:,.0f} | {more:,.0f} |")
    ours, full = (record["ways"][way] for way in WAYS)
    faster = ours["samples_per_second"] / full["samples_per_second"]
    smaller = full["peak_bytes"] / ours["peak_bytes"]
    return "\n".join([*lines, "", f"Ours: {faster:.2f}x the speed, 1/{smaller:.2f} of the peak. {caption(record)}."])

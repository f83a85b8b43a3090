"""A step of training as `experiments.training_cost` measures it: of a draft on stored data, or of a head alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import torch

from eagle.drafts.msd import DraftModel
from eagle.families.base_weights import load_base_tensors
from eagle.hidden_states.shards import ShardDataset
from eagle.train.curriculum import IMAGE, TEXT
from eagle.train.dataset import collate
from eagle.train.engine import PlainEngine, read_deepspeed_config
from eagle.train.loss import draft_loss
from eagle.train.objective import DraftObjective
from eagle.train.schedule import BatchSizes
from eagle.train.settings import read_config
from experiments.full_logits import FullLogitsObjective, full_logits_loss

OURS, FULL = "masked, in chunks", "full logits"
WAYS = (OURS, FULL)
BATCHES = 4
"""Different batches of a draft's training that take turns."""


@dataclass(frozen=True)
class Work:
    """``step`` does one optimizer step (of a head alone: loss and gradient) over ``samples`` samples."""

    step: Callable[[], None]
    samples: int
    device: torch.device


def work_of(way: str, options: argparse.Namespace) -> Work:
    """The work that the options of `experiments.training_cost` ask for, done in one of `WAYS`."""
    torch.manual_seed(0)
    return head_work(way, options) if options.data is None else draft_work(way, options)


def draft_work(way: str, options: argparse.Namespace) -> Work:
    """Steps of the plain engine on the first samples of both sets, in turns."""
    draft_config, config = read_config(options.config)
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
    """Loss and gradient of one sample of random states, the answer at its end."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = {"device": device, "dtype": getattr(torch, options.dtype)}
    size = (1, options.positions, options.hidden)
    head = torch.randn(options.vocab, options.hidden, **made).mul_(options.hidden**-0.5)  # [V, H]
    predicted, target = torch.randn(size, **made, requires_grad=True), torch.randn(size, **made)  # [1, R, H]
    first = round(options.positions * (1 - options.answer_share))
    loss_mask = (torch.arange(options.positions, device=device) >= first)[None]  # [1, R]

    def step() -> None:
        predicted.grad = None
        if way == OURS:
            losses = draft_loss(predicted, target, loss_mask, head, chunk=options.chunk)
        else:
            losses = full_logits_loss(predicted, target, loss_mask, head)
        losses.total.backward()

    return Work(step, 1, device)

"""The training of a pocket target: stages, batches, checkpoints, the loop. What differs by family is in `Family`.

First many short questions a picture and few of the layers, then long answers and more layers (`Stage`). A warm-up, a
constant rate, and a linear decay to zero. Data is drawn on the fly: sample i of a block depends on the seed, the block
and i.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from llava.arguments import OneLineParser
from llava.device import cpu_has_bfloat16

from .encode import IGNORE
from .optimizer import Optimizers
from .sample import WEIGHTS, Conversation, converse

BATCH = 8
BLOCK = 4  # batches that are sorted by length together
WARM_UP = 60
SAVE_SECONDS, TEST_STEPS, TEST_BATCH = 120, 200, 12
log = logging.getLogger("pocket.train")
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """What the run learns after a share of its steps, with every `stride`-th layer; see sample.converse."""

    start: float
    quiz_share: float
    text_share: float
    turns: int
    stride: int = 1
    kinds: tuple[float, ...] = WEIGHTS


@dataclass(frozen=True)
class Plan:
    """What is trained and how fast.

    `data` names the stream of conversations: a model that is trained further needs others than it has seen. `peak`: the
    highest rates as a share of those in optimizer.py; `decay`: the last share of the steps, in which they fall.
    """

    data: str
    stages: Sequence[Stage]
    peak: float = 1.0
    decay: float = 0.3

    def stage(self, step: int, steps: int) -> Stage:
        """The stage a step belongs to."""
        return [s for s in self.stages if s.start * steps <= step][-1]

    def rate(self, step: int, steps: int) -> float:
        """The share of the full learning rates at a step."""
        return self.peak * min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1, int(self.decay * steps)))


class Family(Protocol):
    """What is special about a kind of target: its prompt, its batches, its forward pass."""

    def encode(self, talk: Conversation) -> Any:
        """Tokens (`ids`) and pixels of a conversation."""

    def collate(self, samples: list[Any]) -> Batch:
        """Tensors of several; ids and labels are [B, T]."""

    def hidden(self, model: Any, batch: Batch) -> torch.Tensor:
        """What the head reads, [B, T, H]."""


class Batches(IterableDataset[Batch]):
    """The batches of steps `start` to `steps`, always the same for a seed.

    BLOCK batches are drawn together: similar lengths share a batch, the order of the batches is random.
    """

    def __init__(self, family: Family, plan: Plan, seed: int, start: int, steps: int) -> None:
        """Nothing is drawn yet."""
        self.family, self.plan, self.seed, self.start, self.steps = family, plan, seed, start, steps

    def block(self, number: int) -> list[Batch]:
        """The batches of one block."""
        stage = self.plan.stage(number * BLOCK, self.steps)
        samples = []
        for i in range(BLOCK * BATCH):
            rng = Random(f"{self.plan.data}-{self.seed}-{number}-{i}")
            talk = converse(rng, False, stage.text_share, stage.turns, stage.quiz_share, stage.kinds)
            samples.append(self.family.encode(talk))
        samples.sort(key=lambda e: len(e.ids))
        batches = [self.family.collate(samples[k : k + BATCH]) for k in range(0, len(samples), BATCH)]
        Random(f"order-{self.seed}-{number}").shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[Batch]:
        """From the start on."""
        first, skipped = divmod(self.start, BLOCK)
        for number in range(first, -(-self.steps // BLOCK)):
            yield from self.block(number)[skipped if number == first else 0 :]


def loss_of(model: Any, family: Family, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; the head sees only their positions."""
    kind = batch["ids"].device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" or cpu_has_bfloat16()):
        hidden = family.hidden(model, batch)  # [B, T, H]
        wanted = batch["labels"][:, 1:]
        asked = wanted != IGNORE
        logits = model.lm_head(hidden[:, :-1][asked])  # [N, V]
    return nn.functional.cross_entropy(logits.float(), wanted[asked])


class Run:
    """A training run with everything that a checkpoint holds."""

    def __init__(self, out: Path, model: Any, family: Family, plan: Plan, steps: int, seed: int) -> None:
        """A fresh run of `model`; what asks for no gradient stays as it is."""
        self.out, self.model, self.family, self.plan, self.steps, self.seed = out, model, family, plan, steps, seed
        self.device = model.lm_head.weight.device
        self.layers = model.model.language_model.layers
        self.optimizer = Optimizers(model)
        self.step, self.samples, self.seconds = 0, 0, 0.0

    def save(self) -> None:
        """Write the checkpoint; a crash while writing leaves the former one."""
        used = self.model.model.language_model.layers
        self.model.model.language_model.layers = self.layers
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "samples": self.samples, "seconds": self.seconds, "seed": self.seed,
        }  # fmt: skip
        self.model.model.language_model.layers = used
        temporary = self.out / "checkpoint.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "checkpoint.pt")

    def load(self) -> None:
        """Go on from the checkpoint."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            raise SystemExit(f"no checkpoint to resume: {path}")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.seed = state["step"], state["seconds"], state["seed"]
        self.samples = state["samples"]

    def use_layers(self) -> None:
        """Those of the stage; a layer that has not learnt anything yet joins as a copy that does nothing."""
        stride = self.plan.stage(self.step, self.steps).stride
        used = range(0, len(self.layers), stride)
        for place in used:
            if self.step and not self.optimizer.has_trained(self.layers[place].mlp.down_proj.weight):
                join_silently(self.layers[place], self.layers[place - stride])
        self.model.model.language_model.layers = nn.ModuleList([self.layers[place] for place in used])

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch on the model's device."""
        return loss_of(self.model, self.family, {name: part.to(self.device) for name, part in batch.items()})

    def update(self, batch: Batch) -> float:
        """One step; returns the loss."""
        self.use_layers()
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(self.plan.rate(self.step, self.steps))
        self.step += 1
        self.samples += len(batch["ids"])
        return float(loss.detach())

    def test_loss(self, quiz_share: float) -> float:
        """The loss on a fixed set of held-out conversations."""
        rngs = [Random(f"test-{i}") for i in range(2 * TEST_BATCH)]
        talks = [converse(rng, heldout=True, text_share=0.0, turns=1, quiz_share=quiz_share) for rng in rngs]
        samples = sorted((self.family.encode(t) for t in talks), key=lambda e: len(e.ids))
        with torch.no_grad():
            parts = [float(self.loss(self.family.collate(samples[k : k + TEST_BATCH])))
                     for k in range(0, len(samples), TEST_BATCH)]  # fmt: skip
        return sum(parts) / len(parts)


def join_silently(layer: nn.Module, before: nn.Module) -> None:
    """Makes a layer a copy of the one before it which adds nothing until it has learnt something."""
    layer.load_state_dict(before.state_dict())
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def compile_layers(model: Any) -> None:
    """Fuse the elementwise work inside layers (a quarter more samples a second on a CPU)."""
    for layer in model.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def arguments(doc: str | None, steps: int) -> argparse.ArgumentParser:
    """What the command line of every training takes."""
    parser = OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of tokenizer, checkpoint and log")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="resume exactly where it stopped")
    return parser


def begin(args: argparse.Namespace, name: str) -> None:
    """The folder, a log in it, and the threads."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=args.out / name, level=logging.INFO, format="%(asctime)s %(message)s")


def train(run: Run) -> None:
    """All steps that are left, with a bar, a log line every 10 steps and checkpoints."""
    saved = began = time.monotonic()
    before, mean, steps, seen = run.seconds, None, run.steps, run.samples
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    bar = tqdm(total=steps, initial=run.step, unit="step", mininterval=5)
    source = Batches(run.family, run.plan, run.seed, run.step, steps)
    for batch in DataLoader(source, batch_size=None, num_workers=1, prefetch_factor=2 * BLOCK):
        loss = run.update(batch)
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        now = time.monotonic()
        run.seconds = before + now - began
        speed = (run.samples - seen) / (now - began)
        bar.set_postfix(loss=f"{mean:.3f}", samples_s=f"{speed:.1f}", refresh=False)
        bar.update()
        if run.step % 10 == 0:
            log.info(json.dumps({"step": run.step, "samples": run.samples, "loss": round(mean, 4),
                                 "seconds": round(run.seconds, 1), "samples_per_second": round(speed, 2)}))  # fmt: skip
        if run.step % TEST_STEPS == 0 or run.step == steps:
            tests = {"quiz": round(run.test_loss(1.0), 4), "long": round(run.test_loss(0.0), 4)}
            log.info(json.dumps({"step": run.step, "heldout_loss": tests}))
        if now - saved > SAVE_SECONDS or run.step == steps or stopped:
            run.save()
            saved = now
        if stopped:
            break
    bar.close()

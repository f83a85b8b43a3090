"""Train the pocket LLaVA from scratch.

python -m pocket.train_target --out pocket/build --steps 1500
python -m pocket.train_target --out pocket/build --steps 1500 --resume   (goes on exactly where it stopped)

AdamW with warm-up, a constant rate, and a linear decay to zero over the last DECAY of the steps. Data is drawn on
the fly: sample i of a block depends on the seed, the block and i.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from random import Random
from threading import Thread
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .draw import draw
from .encode import IGNORE, Encoded, Tokenizer, collate, encode, pixels_of
from .model import fresh, parameter_count
from .sample import MAX_TURNS, TEXT_SHARE, WEIGHTS, Conversation, converse
from .tokenizer import train_tokenizer

BATCH = 32
BLOCK = 4  # batches that are sorted by length together
WARM_UP = 40
DECAY = 0.35
LEARNING_RATE = 1.5e-3
SAVE_SECONDS, TEST_STEPS, TEST_BATCH = 180, 100, 12
log = logging.getLogger("pocket.train")


def encode_conversation(tokenizer: Tokenizer, talk: Conversation) -> Encoded:
    """Tokens and pixels of a conversation."""
    pixels = None if talk.picture is None else pixels_of(draw(talk.picture))
    return encode(tokenizer, [(t.question, t.answer) for t in talk.turns], pixels)


@dataclass(frozen=True)
class Stage:
    """What the run learns from a step (a multiple of BLOCK) on."""

    start: int
    weights: tuple[float, ...] = WEIGHTS
    text_share: float = TEXT_SHARE
    turns: int = MAX_TURNS


STAGES = (
    Stage(0, weights=(1, 1, 0.4, 0.6, 1.4), text_share=0.0, turns=1),
    Stage(320, text_share=0.04, turns=2),
    Stage(600),
)


def stage_of(step: int) -> Stage:
    """The stage a step belongs to."""
    return [s for s in STAGES if s.start <= step][-1]


def training_batch_block(tokenizer: Tokenizer, seed: int, block: int) -> list[dict[str, torch.Tensor]]:
    """The batches of one block: similar lengths share a batch, the order of batches is random."""
    stage = stage_of(block * BLOCK)
    samples = []
    for i in range(BLOCK * BATCH):
        talk = converse(Random(f"train-{seed}-{block}-{i}"), False, stage.text_share, stage.turns, stage.weights)
        samples.append(encode_conversation(tokenizer, talk))
    samples.sort(key=lambda e: len(e.ids))
    batches = [collate(samples[k : k + BATCH]) for k in range(0, len(samples), BATCH)]
    Random(f"order-{seed}-{block}").shuffle(batches)
    return batches


def batches_from(run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """Batches from the run's step on, prepared by a thread."""
    step, steps = run.step, run.steps
    queue: Queue[dict[str, torch.Tensor]] = Queue(maxsize=2 * BLOCK)

    def fill() -> None:
        for block in range(step // BLOCK, -(-steps // BLOCK)):
            batches = training_batch_block(run.tokenizer, run.seed, block)
            for batch in batches[step % BLOCK if block == step // BLOCK else 0 :]:
                queue.put(batch)

    Thread(target=fill, daemon=True).start()
    for _ in range(step, steps):
        yield queue.get()


def loss_of(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; the head sees only their positions."""
    ids, labels = batch["ids"].to(device), batch["labels"].to(device)
    pixels = batch["pixels"].to(device) if len(batch["pixels"]) else None
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state  # [B, T, H]
        wanted = labels[:, 1:]
        asked = wanted != IGNORE
        logits = model.lm_head(hidden[:, :-1][asked])  # [N, V]
    return nn.functional.cross_entropy(logits.float(), wanted[asked])


def rate(step: int, steps: int) -> float:
    """The share of the full learning rate at a step."""
    decay = max(1, int(DECAY * steps))
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / decay)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with decay for matrices alone."""
    matrices = [w for w in model.parameters() if w.ndim > 1]
    others = [w for w in model.parameters() if w.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


class Run:
    """A training run with everything that a checkpoint holds."""

    def __init__(self, out: Path, steps: int, seed: int, device: torch.device) -> None:
        """A fresh run."""
        self.out, self.steps, self.seed, self.device = out, steps, seed, device
        self.model = fresh(seed).to(device)
        self.optimizer = optimizer_of(self.model)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        if not (out / "tokenizer.model").exists():
            train_tokenizer(out, seed=seed)
        self.tokenizer = Tokenizer(out)

    def save(self) -> None:
        """Write the checkpoint; a crash while writing leaves the former one."""
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "samples": self.samples, "seconds": self.seconds, "seed": self.seed,
        }  # fmt: skip
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

    def update(self, batch: dict[str, torch.Tensor]) -> float:
        """One step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(self.step, self.steps)
        loss = loss_of(self.model, batch, self.device)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.samples += len(batch["ids"])
        return float(loss.detach())

    def test_loss(self) -> float:
        """The loss on a fixed set of held-out conversations."""
        talks = [converse(Random(f"test-{i}"), heldout=True, text_share=0.0, turns=1) for i in range(2 * TEST_BATCH)]
        samples = sorted((encode_conversation(self.tokenizer, t) for t in talks), key=lambda e: len(e.ids))
        with torch.no_grad():
            parts = [float(loss_of(self.model, collate(samples[k : k + TEST_BATCH]), self.device))
                     for k in range(0, len(samples), TEST_BATCH)]  # fmt: skip
        return sum(parts) / len(parts)


def compile_layers(model: Any) -> None:
    """Fuse the elementwise work inside layers (a quarter more samples a second on a CPU)."""
    for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def train(run: Run) -> None:
    """All steps that are left, with a bar, a log line every 10 steps and checkpoints."""
    saved = began = time.monotonic()
    before, mean, steps, seen = run.seconds, None, run.steps, run.samples
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    bar = tqdm(total=steps, initial=run.step, unit="step", mininterval=5)
    for batch in batches_from(run):
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
            log.info(json.dumps({"step": run.step, "heldout_loss": round(run.test_loss(), 4)}))
        if now - saved > SAVE_SECONDS or run.step == steps or stopped:
            run.save()
            saved = now
        if stopped:
            break
    bar.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of tokenizer, checkpoint and log")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=args.out / "train.log", level=logging.INFO, format="%(asctime)s %(message)s")
    run = Run(args.out, args.steps, args.seed, torch.device(args.device))
    if args.resume:
        run.load()
    log.info(json.dumps({"parameters": parameter_count(run.model), "from": run.step, "steps": run.steps}))
    if args.compile:
        compile_layers(run.model)
    train(run)


if __name__ == "__main__":
    main()

"""Train the pocket LLaVA from scratch.

python -m pocket.train_target --out pocket/build
python -m pocket.train_target --out pocket/build --resume   (goes on exactly where it stopped)
python -m pocket.train_target --out pocket/more --start pocket/llava --steps 600   (trains a finished model further)

Starts from the vision tower of pocket.train_tower, which stays as it is: trained along from the start, all image
features soon share one large part that drowns their differences, and the model goes blind. First many short questions
a picture and few of the layers, then long answers and more layers (STAGES). A warm-up, a constant rate, and a linear
decay to zero over the last DECAY of the steps. Data is drawn on the fly: sample i of a block depends on the seed, the
block and i.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from llava import load_pretrained
from llava.device import cpu_has_bfloat16

from .draw import draw
from .encode import IGNORE, Encoded, Tokenizer, collate, encode, pixels_of
from .model import fresh, parameter_count
from .optimizer import Optimizers
from .sample import MAX_TURNS, TEXT_SHARE, Conversation, converse

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
BATCH = 8
BLOCK = 4  # batches that are sorted by length together
WARM_UP = 60
DECAY = 0.3
SAVE_SECONDS, TEST_STEPS, TEST_BATCH = 120, 200, 12
log = logging.getLogger("pocket.train")


def encode_conversation(tokenizer: Tokenizer, talk: Conversation) -> Encoded:
    """Tokens and pixels of a conversation."""
    pixels = None if talk.picture is None else pixels_of(draw(talk.picture))
    return encode(tokenizer, [(t.question, t.answer) for t in talk.turns], pixels)


@dataclass(frozen=True)
class Stage:
    """What the run learns after a share of its steps, with every `stride`-th layer."""

    start: float
    quiz_share: float
    text_share: float
    turns: int
    stride: int


STAGES = (
    Stage(0.0, quiz_share=1.0, text_share=0.0, turns=1, stride=4),
    Stage(0.375, quiz_share=0.4, text_share=0.08, turns=3, stride=2),
    Stage(0.94, quiz_share=0.25, text_share=TEXT_SHARE, turns=MAX_TURNS, stride=1),
)


SETTLED = (replace(STAGES[-1], start=0.0),)
"""For a model that has been through all stages."""


def stage_of(step: int, steps: int, stages: Sequence[Stage] = STAGES) -> Stage:
    """The stage a step belongs to."""
    return [s for s in stages if s.start * steps <= step][-1]


class Batches(IterableDataset[dict[str, torch.Tensor]]):
    """The batches of steps `start` to `steps`, always the same for a seed.

    BLOCK batches are drawn together: similar lengths share a batch, the order of the batches is random.
    """

    def __init__(self, tokenizer: Path, seed: int, start: int, steps: int, stages: Sequence[Stage] = STAGES) -> None:
        """`tokenizer` is the folder of tokenizer.model."""
        self.tokenizer, self.seed, self.start, self.steps = Tokenizer(tokenizer), seed, start, steps
        self.stages = stages

    def block(self, number: int) -> list[dict[str, torch.Tensor]]:
        """The batches of one block."""
        stage = stage_of(number * BLOCK, self.steps, self.stages)
        samples = []
        for i in range(BLOCK * BATCH):
            rng = Random(f"train-{self.seed}-{number}-{i}")
            talk = converse(rng, False, stage.text_share, stage.turns, stage.quiz_share)
            samples.append(encode_conversation(self.tokenizer, talk))
        samples.sort(key=lambda e: len(e.ids))
        batches = [collate(samples[k : k + BATCH]) for k in range(0, len(samples), BATCH)]
        Random(f"order-{self.seed}-{number}").shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """From the start on."""
        first, skipped = divmod(self.start, BLOCK)
        for number in range(first, -(-self.steps // BLOCK)):
            yield from self.block(number)[skipped if number == first else 0 :]


def loss_of(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; the head sees only their positions."""
    ids, labels = batch["ids"].to(device), batch["labels"].to(device)
    pixels = batch["pixels"].to(device) if len(batch["pixels"]) else None
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu_has_bfloat16()):
        hidden = model.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state  # [B, T, H]
        wanted = labels[:, 1:]
        asked = wanted != IGNORE
        logits = model.lm_head(hidden[:, :-1][asked])  # [N, V]
    return nn.functional.cross_entropy(logits.float(), wanted[asked])


def rate(step: int, steps: int) -> float:
    """The share of the full learning rates at a step."""
    decay = max(1, int(DECAY * steps))
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / decay)


def tower_weights(out: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """What pocket.train_tower has made."""
    tower = out / "tower.pt"
    if not tower.exists():
        raise SystemExit(f"no vision tower: {tower}; make it with: python -m pocket.train_tower --out {out}")
    weights: dict[str, torch.Tensor] = torch.load(tower, map_location=device, weights_only=True)
    return weights


class Run:
    """A training run with everything that a checkpoint holds."""

    def __init__(self, out: Path, steps: int, seed: int, device: torch.device, start: Path | None = None) -> None:
        """A fresh run; the vision tower comes from OUT/tower.pt, or everything from a finished model in `start`."""
        self.out, self.steps, self.seed, self.device = out, steps, seed, device
        self.stages: Sequence[Stage] = STAGES if start is None else SETTLED
        self.model = fresh(seed).to(device)
        if start is None:
            self.model.load_state_dict({**self.model.state_dict(), **tower_weights(out, device)})
        else:
            self.model.load_state_dict(load_pretrained(start, dtype="float32")[0].state_dict())
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(False)
        self.layers = self.model.model.language_model.layers
        self.optimizer = Optimizers(self.model)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.tokenizer = Tokenizer(start or out)

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
        stride = stage_of(self.step, self.steps, self.stages).stride
        used = range(0, len(self.layers), stride)
        for place in used:
            if self.step and not self.optimizer.has_trained(self.layers[place].mlp.down_proj.weight):
                join_silently(self.layers[place], self.layers[place - stride])
        self.model.model.language_model.layers = nn.ModuleList([self.layers[place] for place in used])

    def update(self, batch: dict[str, torch.Tensor]) -> float:
        """One step; returns the loss."""
        self.use_layers()
        loss = loss_of(self.model, batch, self.device)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(rate(self.step, self.steps))
        self.step += 1
        self.samples += len(batch["ids"])
        return float(loss.detach())

    def test_loss(self, quiz_share: float) -> float:
        """The loss on a fixed set of held-out conversations."""
        rngs = [Random(f"test-{i}") for i in range(2 * TEST_BATCH)]
        talks = [converse(rng, heldout=True, text_share=0.0, turns=1, quiz_share=quiz_share) for rng in rngs]
        samples = sorted((encode_conversation(self.tokenizer, t) for t in talks), key=lambda e: len(e.ids))
        with torch.no_grad():
            parts = [float(loss_of(self.model, collate(samples[k : k + TEST_BATCH]), self.device))
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


def train(run: Run) -> None:
    """All steps that are left, with a bar, a log line every 10 steps and checkpoints."""
    saved = began = time.monotonic()
    before, mean, steps, seen = run.seconds, None, run.steps, run.samples
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    bar = tqdm(total=steps, initial=run.step, unit="step", mininterval=5)
    source = Batches(run.out, run.seed, run.step, steps, run.stages)
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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of tokenizer, checkpoint and log")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--start", type=Path, help="train a finished model (pocket/llava) further")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=args.out / "train.log", level=logging.INFO, format="%(asctime)s %(message)s")
    if args.start is not None:
        for name in TOKENIZER_FILES:
            shutil.copy(args.start / name, args.out / name)
    run = Run(args.out, args.steps, args.seed, torch.device(args.device), args.start)
    if args.resume:
        run.load()
    log.info(json.dumps({"parameters": parameter_count(run.model), "from": run.step, "steps": run.steps}))
    if args.compile:
        compile_layers(run.model)
    train(run)


if __name__ == "__main__":
    main()

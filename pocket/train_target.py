"""Train the pocket LLaVA from scratch.

python -m pocket.train_target --out pocket/build --steps 1400
python -m pocket.train_target --out pocket/build --steps 1400 --resume   (goes on exactly where it stopped)

Muon for the matrices of the layers, AdamW for embeddings, head, norms and biases; warm-up, a constant rate, and a
linear decay to zero over the last DECAY of the steps. Data is drawn on the fly: sample i depends on the seed and i.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
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

BLOCK = 8  # batches that are sorted by length together
WARM_UP = 30
DECAY = 0.35
ADAM_LR = 3e-3
SCALE = 6.0  # size of image features after recentring
WORD_SCALE = 6.0  # token embeddings are wide and need larger steps
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
    batch: int
    muon_lr: float
    weights: tuple[float, ...] = WEIGHTS
    text_share: float = TEXT_SHARE
    turns: int = MAX_TURNS
    recentre: bool = False


STAGES = (
    Stage(0, 12, 6e-3, text_share=0.0, turns=2),
    Stage(248, 20, 5e-3, weights=(0, 0, 0, 0, 1), text_share=0.0, turns=1),
    Stage(344, 12, 5e-3, text_share=0.0, turns=2),
    Stage(363, 14, 4e-3, weights=(0.5, 0.5, 0.3, 0.3, 2), text_share=0.0, turns=1, recentre=True),
    Stage(480, 12, 4e-3, text_share=0.0, turns=2),
    Stage(600, 12, 4e-3),
)


def stage_of(step: int) -> Stage:
    """The stage a step belongs to."""
    return [s for s in STAGES if s.start <= step][-1]


def training_batch_block(tokenizer: Tokenizer, seed: int, block: int) -> list[dict[str, torch.Tensor]]:
    """The batches of one block: similar lengths share a batch, the order of batches is random."""
    stage = stage_of(block * BLOCK)
    samples = []
    for i in range(BLOCK * stage.batch):
        talk = converse(Random(f"train-{seed}-{block}-{i}"), False, stage.text_share, stage.turns, stage.weights)
        samples.append(encode_conversation(tokenizer, talk))
    samples.sort(key=lambda e: len(e.ids))
    batches = [collate(samples[k : k + stage.batch]) for k in range(0, len(samples), stage.batch)]
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


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside layers and projector, AdamW for all other weights."""
    matrices, others, words = [], [], []
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            words.append(weight)
        elif weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            matrices.append(weight)
        else:
            others.append(weight)
    muon = torch.optim.Muon(matrices, lr=STAGES[0].muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(
        [{"params": others, "scale": 1.0}, {"params": words, "scale": WORD_SCALE}],
        lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0,
    )  # fmt: skip
    return [muon, adam]


class Run:
    """A training run with everything that a checkpoint holds."""

    def __init__(self, out: Path, steps: int, seed: int, device: torch.device) -> None:
        """A fresh run."""
        self.out, self.steps, self.seed, self.device = out, steps, seed, device
        self.model = fresh(seed).to(device)
        self.optimizers = optimizers(self.model)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        if not (out / "tokenizer.model").exists():
            train_tokenizer(out, seed=seed)
        self.tokenizer = Tokenizer(out)

    def save(self) -> None:
        """Write the checkpoint; a crash while writing leaves the former one."""
        state = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
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
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.seed = state["step"], state["seconds"], state["seed"]
        self.samples = state["samples"]

    def update(self, batch: dict[str, torch.Tensor]) -> float:
        """One step; returns the loss."""
        muon_lr = stage_of(self.step).muon_lr
        for optimizer, full in zip(self.optimizers, (muon_lr, ADAM_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * group.get("scale", 1.0) * rate(self.step, self.steps)
        loss = loss_of(self.model, batch, self.device)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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


def recentre(model: Any, tokenizer: Tokenizer, device: torch.device) -> None:
    """Shrink what all image features have in common to the size of what tells them apart, and both to SCALE.

    The common part grows early in a run; the norms of the language model then hide the differences.
    """
    talks = [converse(Random(f"centre-{i}"), text_share=0.0, turns=1) for i in range(4 * TEST_BATCH)]
    pixels = collate([encode_conversation(tokenizer, t) for t in talks])["pixels"].to(device)
    with torch.no_grad():
        seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]  # [B, 100, D]
        features = model.model.multi_modal_projector(seen)
        common = features.mean((0, 1))
        spread = (features - common).square().mean().sqrt()
        last = model.model.multi_modal_projector.linear_2
        last.bias.sub_(common - common / common.square().mean().sqrt() * spread)
        for weight in (last.weight, last.bias):
            weight.mul_(SCALE / spread)


def compile_layers(model: Any) -> None:
    """Fuse the elementwise work inside layers (a quarter more samples a second on a CPU)."""
    for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def train(run: Run) -> None:
    """All steps that are left, with a bar, a log line every 10 steps and checkpoints."""
    saved = began = time.monotonic()
    before, mean, steps, seen = run.seconds, None, run.steps, run.samples
    bar = tqdm(total=steps, initial=run.step, unit="step", mininterval=5)
    for batch in batches_from(run):
        if run.step == stage_of(run.step).start and stage_of(run.step).recentre:
            recentre(run.model, run.tokenizer, run.device)
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
        if now - saved > SAVE_SECONDS or run.step == steps:
            run.save()
            saved = now
    bar.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of tokenizer, checkpoint and log")
    parser.add_argument("--steps", type=int, default=1400)
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

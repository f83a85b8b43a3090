"""Teach Qwen2-VL's vision tower to read: it learns from the pocket LLaVA's.

python -m pocket.recipe.qwen.train_tower --out pocket/build/qwen

Every merged patch of 16 pixels must give the feature that the LLaVA's tower and projector give for the same place of
the picture, point at the embeddings of the tokens that stand there, and let two linear heads tell the statements about
it and the colours' cover (pocket.recipe.patches). Writes the tokenizer and OUT/tower.pt. Resumes with --resume.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava import load_pretrained
from llava.device import cpu_has_bfloat16
from pocket.recipe.draw import ROW, sketch_of
from pocket.recipe.encode import SIDE, Tokenizer
from pocket.recipe.model import TEXT
from pocket.recipe.patches import GRID, collate_labels, label
from pocket.recipe.sample import draw_picture_data
from pocket.recipe.train_tower import Heads, label_losses
from pocket.recipe.training import arguments, begin, log

from .encode import Qwen
from .model import fresh
from .tokenizer import load_tokenizer, train_tokenizer

TEACHER = Path(__file__).resolve().parents[2] / "llava"
BATCH = 12
WARM_UP, DECAY = 50, 0.5
LEARNING_RATE = 1.2e-3
SAVE_SECONDS = 120
PARTS = ("visual", "heads", "optimizer")


class Pictures(Dataset[dict[str, torch.Tensor]]):
    """Batch i of labelled pictures from the training side of the split, for both towers.

    Besides collate_labels' tensors: patches, grid (Qwen2-VL's); places [N], where in the flattened (B, GRID * GRID)
    patches of the padded pictures each merged patch lies.
    """

    def __init__(self, folder: Path, seed: int, start: int, steps: int) -> None:
        """Batches `start` to `steps`."""
        self.family, self.words = Qwen(folder), Tokenizer(TEACHER)
        self.seed, self.start, self.steps = seed, start, steps

    def __len__(self) -> int:
        """The number of batches."""
        return self.steps - self.start

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """See the class."""
        rngs = [Random(f"qwen-tower-{self.seed}-{self.start + item}-{i}") for i in range(BATCH)]
        sketches = [sketch_of(draw_picture_data(rng, False)) for rng in rngs]
        batch = collate_labels([label(self.words, sketch) for sketch in sketches], TEXT["vocab_size"])
        patches, grids = zip(*(self.family.pixels(sketch.image) for sketch in sketches), strict=True)
        places = []
        for number, sketch in enumerate(sketches):
            columns, rows = (side // ROW for side in sketch.image.size)
            left, top = (SIDE - sketch.image.width) // 2 // ROW, (SIDE - sketch.image.height) // 2 // ROW
            inside = torch.arange(GRID * GRID).view(GRID, GRID)[top : top + rows, left : left + columns]
            places.append(number * GRID * GRID + inside.flatten())
        return {**batch, "patches": torch.cat(patches), "grid": torch.stack(grids), "places": torch.cat(places)}


@torch.no_grad()
def teach(teacher: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The projected features of the LLaVA's tower, [B * GRID * GRID, H]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
        features = teacher.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        projected: torch.Tensor = teacher.model.multi_modal_projector(features)
    return projected.float().flatten(0, 1)


def losses_of(visual: Any, teacher: Any, heads: Heads, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The losses of a batch; `feature` is the share of the teacher's variance that is missed."""
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
        learnt = visual(batch["patches"], grid_thw=batch["grid"]).pooler_output.float()  # [N, H]
    wanted = teach(teacher, batch["pixels"])[batch["places"]]
    labels = {name: batch[name].flatten(0, 1)[batch["places"]] for name in ("tokens", "buckets", "cover")}
    missed = (learnt - wanted).square().mean() / wanted.var(0).mean()
    return {
        "feature": 4 * missed,
        **label_losses(heads, learnt, teacher.model.language_model.embed_tokens.weight, labels),
    }


class Tower:
    """The training of the tower with all a checkpoint holds."""

    def __init__(self, out: Path, steps: int, seed: int) -> None:
        """Makes the tokenizer if there is none."""
        self.out, self.steps, self.seed, self.step = out, steps, seed, 0
        if not (out / "tokenizer.json").exists():
            train_tokenizer(out, seed)
        self.teacher = load_pretrained(TEACHER, dtype="float32")[0].requires_grad_(False)
        self.visual, self.heads = fresh(load_tokenizer(out), seed).model.visual, Heads()
        self.learnt = [*self.visual.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(self.learnt, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.out / "tower.pt", weights_only=True)
        for part in PARTS:
            getattr(self, part).load_state_dict(state[part])
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint in one go."""
        state = {part: getattr(self, part).state_dict() for part in PARTS}
        torch.save({**state, "step": self.step}, self.out / "tower.pt.tmp")
        os.replace(self.out / "tower.pt.tmp", self.out / "tower.pt")

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """One step; returns the losses."""
        share = min(1.0, (self.step + 1) / WARM_UP, (self.steps - self.step) / max(1, DECAY * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        parts = losses_of(self.visual, self.teacher, self.heads, batch)
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: round(float(loss.detach()), 4) for name, loss in parts.items()}


def train(tower: Tower) -> None:
    """All steps that are left."""
    began = saved = time.monotonic()
    bar = tqdm(total=tower.steps, initial=tower.step, unit="step", mininterval=5)
    pictures = Pictures(tower.out, tower.seed, tower.step, tower.steps)
    for batch in DataLoader(pictures, batch_size=None, num_workers=1, prefetch_factor=4):
        losses = tower.update(batch)
        bar.update()
        if tower.step % 20 == 0:
            bar.set_postfix(losses, refresh=False)
            log.info(json.dumps({"step": tower.step, "seconds": round(time.monotonic() - began), **losses}))
        if time.monotonic() - saved > SAVE_SECONDS or tower.step == tower.steps:
            tower.save()
            saved = time.monotonic()
    bar.close()


def main() -> None:
    """Command line."""
    args = arguments(__doc__, steps=900).parse_args()
    begin(args, "tower.log")
    tower = Tower(args.out, args.steps, args.seed)
    if args.resume:
        tower.load()
    train(tower)


if __name__ == "__main__":
    main()

"""Teach the vision tower to read before the whole model is trained, as CLIP's tower knows pictures before LLaVA does.

python -m pocket.recipe.train_tower --out pocket/build --steps 1600

Every patch feature, after the projector, must point at the embeddings of the tokens that stand on its patch; two
linear heads on it, thrown away afterwards, ask for the statements about the patch and for the colours' cover. Writes
OUT/tower.pt with vision tower, projector and embeddings. Without a stop in between.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.arguments import OneLineParser
from llava.device import cpu_has_bfloat16
from llava.errors import run_cli

from .draw import sketch_of
from .encode import Tokenizer
from .model import TEXT, fresh
from .patches import BUCKETS, collate_labels, label
from .sample import draw_picture_data
from .spec import SCENE_COLOURS
from .tokenizer import train_tokenizer

BATCH = 16
WARM_UP, DECAY = 50, 0.4
LEARNING_RATE = 1.2e-3
FEATURE_NORM = 1.5
PARTS = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.embed_tokens.")
log = logging.getLogger("pocket.recipe.train_tower")


class Heads(nn.Module):
    """What a projected feature is asked besides the tokens."""

    def __init__(self) -> None:
        """Fresh heads."""
        super().__init__()
        self.statements = nn.Linear(TEXT["hidden_size"], BUCKETS)
        self.cover = nn.Linear(TEXT["hidden_size"], len(SCENE_COLOURS))
        self.sharpness = nn.Parameter(torch.tensor(2.3))


class Labels(Dataset[dict[str, torch.Tensor]]):
    """Batch i of labelled pictures from the training side of the split."""

    def __init__(self, tokenizer_folder: Path, seed: int, steps: int) -> None:
        """`steps` batches of BATCH pictures."""
        self.tokenizer, self.seed, self.steps = Tokenizer(tokenizer_folder), seed, steps

    def __len__(self) -> int:
        """The number of batches."""
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """See collate_labels."""
        rngs = [Random(f"tower-{self.seed}-{step}-{i}") for i in range(BATCH)]
        labelled = [label(self.tokenizer, sketch_of(draw_picture_data(rng, False))) for rng in rngs]
        return collate_labels(labelled, TEXT["vocab_size"])


def _soft(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with shares, mean over the patches which have any."""
    losses = -(shares * logits.log_softmax(-1)).sum(-1)
    return losses.sum() / shares.sum().clamp(min=1)


def label_losses(
    heads: Heads, features: torch.Tensor, embeddings: torch.Tensor, labels: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The losses of patches' features [..., H] against labels of the same leading shape; see patches.collate_labels."""
    filled = labels["tokens"].sum(-1) > 0
    scores = features[filled] @ embeddings.T * heads.sharpness.exp()  # [N, V]
    return {
        "tokens": _soft(scores, labels["tokens"][filled]),
        "statements": _soft(heads.statements(features), labels["buckets"]),
        "cover": 20 * nn.functional.mse_loss(heads.cover(features), labels["cover"]),
    }


def losses_of(model: Any, heads: Heads, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The losses of a batch; features are to be about as long as embeddings, so that neither drowns the other."""
    inner = model.model
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
        features = inner.vision_tower(batch["pixels"], output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = inner.multi_modal_projector(features).float()  # [B, P, H]
    return {
        **label_losses(heads, projected, inner.language_model.embed_tokens.weight, batch),
        "size": 0.05 * (projected.norm(dim=-1) - FEATURE_NORM).square().mean(),
    }


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1, DECAY * steps))


def train(out: Path, steps: int, seed: int, start: Path | None = None) -> None:
    """All steps, then OUT/tower.pt; `start` is an earlier tower.pt to start from."""
    if not (out / "tokenizer.model").exists():
        train_tokenizer(out, seed=seed)
    model, heads = fresh(seed), Heads()
    if start is not None:
        model.load_state_dict({**model.state_dict(), **torch.load(start, weights_only=True)})
    batches = DataLoader(Labels(out, seed, steps), batch_size=None, num_workers=1, prefetch_factor=4)
    learnt = [w for name, w in model.named_parameters() if name.startswith(PARTS)] + list(heads.parameters())
    optimizer = torch.optim.AdamW(learnt, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    began, bar = time.monotonic(), tqdm(total=steps, unit="step", mininterval=5)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _rate(step, steps)
        parts = losses_of(model, heads, batch)
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if (step + 1) % 20 == 0:
            shown = {name: round(float(loss.detach()), 4) for name, loss in parts.items()}
            bar.set_postfix(shown, refresh=False)
            log.info(json.dumps({"step": step + 1, "seconds": round(time.monotonic() - began), **shown}))
    bar.close()
    state = {name: w for name, w in model.state_dict().items() if name.startswith(PARTS)}
    torch.save(state, out / "tower.pt.tmp")
    os.replace(out / "tower.pt.tmp", out / "tower.pt")


def main() -> None:
    """Command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of tokenizer, tower and log")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a tower.pt to start from")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=args.out / "tower.log", level=logging.INFO, format="%(asctime)s %(message)s")
    train(args.out, args.steps, args.seed, args.start)


if __name__ == "__main__":
    sys.exit(run_cli(main))

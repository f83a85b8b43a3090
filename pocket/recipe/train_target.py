"""Train the pocket LLaVA from scratch.

python -m pocket.recipe.train_target --out pocket/build
python -m pocket.recipe.train_target --out pocket/build --resume   (resumes exactly where it stopped)
python -m pocket.recipe.train_target --out pocket/more --start pocket/llava --steps 660   (continues a model)

Starts from the vision tower of pocket.recipe.train_tower, which stays as it is: trained along from the start, all image
features soon share one large part that drowns their differences, and the model goes blind.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from llava import load_pretrained
from llava.errors import run_cli

from .draw import draw
from .encode import Encoded, Tokenizer, collate, encode, pixels_of
from .model import fresh, parameter_count
from .sample import MAX_TURNS, TEXT_SHARE, Conversation
from .training import Batch, Plan, Run, Stage, arguments, begin, compile_layers, log, train

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
FROM_SCRATCH = Plan("train", (
    Stage(0.0, quiz_share=1.0, text_share=0.0, turns=1, stride=4),
    Stage(0.375, quiz_share=0.4, text_share=0.08, turns=3, stride=2),
    Stage(0.94, quiz_share=0.25, text_share=TEXT_SHARE, turns=MAX_TURNS, stride=1),
))  # fmt: skip
MORE_SCENES = (1.0, 1.3, 1.0, 0.8, 2.5)
FURTHER = Plan("further", (Stage(0.0, 0.3, TEXT_SHARE, MAX_TURNS, kinds=MORE_SCENES),), peak=0.35, decay=1.0)
"""For a model that has been through all stages. Scenes are learnt last, so they come more often. Rates are low: full
rates undo more in 100 steps than 600 steps can repair."""


class Llava:
    """LLaVA-1.5 as the training sees it (training.Family)."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds tokenizer.model."""
        self.tokenizer = Tokenizer(folder)

    def encode(self, talk: Conversation) -> Encoded:
        """Tokens and pixels of a conversation."""
        pixels = None if talk.picture is None else pixels_of(draw(talk.picture))
        return encode(self.tokenizer, [(t.question, t.answer) for t in talk.turns], pixels)

    def collate(self, samples: list[Encoded]) -> Batch:
        """See encode.collate."""
        return collate(samples)

    def hidden(self, model: Any, batch: Batch) -> torch.Tensor:
        """[B, T, H]."""
        pixels = batch["pixels"] if len(batch["pixels"]) else None
        output = model.model(input_ids=batch["ids"], pixel_values=pixels, use_cache=False)
        states: torch.Tensor = output.last_hidden_state
        return states


def tower_weights(out: Path) -> dict[str, torch.Tensor]:
    """What pocket.recipe.train_tower has made."""
    tower = out / "tower.pt"
    if not tower.exists():
        raise SystemExit(f"no vision tower: {tower}; make it with: python -m pocket.recipe.train_tower --out {out}")
    weights: dict[str, torch.Tensor] = torch.load(tower, map_location="cpu", weights_only=True)
    return weights


def start_model(out: Path, seed: int, start: Path | None) -> Any:
    """A fresh model with the tower in OUT/tower.pt, or the finished one in `start`; the tower is frozen."""
    model = fresh(seed)
    if start is None:
        model.load_state_dict({**model.state_dict(), **tower_weights(out)})
    else:
        model.load_state_dict(load_pretrained(start, dtype="float32")[0].state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    return model


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, steps=4000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--start", type=Path, help="train a finished model (pocket/llava) further")
    args = parser.parse_args()
    begin(args, "train.log")
    if args.start is not None:
        for name in TOKENIZER_FILES:
            shutil.copy(args.start / name, args.out / name)
    model = start_model(args.out, args.seed, args.start).to(args.device)
    plan = FROM_SCRATCH if args.start is None else FURTHER
    run = Run(args.out, model, Llava(args.out), plan, args.steps, args.seed)
    if args.resume:
        run.load()
    log.info(json.dumps({"parameters": parameter_count(model), "from": run.step, "steps": run.steps}))
    if args.compile:
        compile_layers(model)
    train(run)


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Train the pocket Qwen2-VL, whose language model starts as the pocket LLaVA's.

python -m pocket.recipe.qwen.train_target --out pocket/build/qwen   (after pocket.recipe.qwen.train_tower; --resume)

The tower stays as it is. All layers learn from the first step, short questions first. With --start a finished model
learns on, from conversations that it has not seen.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration

from llava import load_pretrained
from pocket.recipe.encode import Tokenizer
from pocket.recipe.model import parameter_count
from pocket.recipe.sample import MAX_TURNS, TEXT_SHARE
from pocket.recipe.train_target import MORE_SCENES
from pocket.recipe.training import Plan, Run, Stage, arguments, begin, compile_layers, log, train

from .encode import Qwen
from .model import fresh, take_over
from .tokenizer import FILES, load_tokenizer
from .train_tower import TEACHER

PLAN = Plan("qwen", (
    Stage(0.0, quiz_share=0.7, text_share=0.08, turns=2, kinds=MORE_SCENES),
    Stage(0.4, quiz_share=0.3, text_share=TEXT_SHARE, turns=MAX_TURNS, kinds=MORE_SCENES),
), peak=0.6, decay=0.8)  # fmt: skip


FURTHER = Plan("qwen-further", (
    Stage(0.0, quiz_share=0.25, text_share=0.06, turns=MAX_TURNS, kinds=(1.0, 1.3, 1.2, 0.6, 3.5)),
), peak=0.35, decay=1.0)  # fmt: skip
"""As that of the LLaVA (pocket.recipe.train_target): scenes are learnt last."""


def start_model(out: Path, seed: int, start: Path | None = None) -> Any:
    """The tower of OUT/tower.pt, frozen, and the pocket LLaVA's language model; or the finished model in `start`."""
    if start is not None:
        finished = Qwen2VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        finished.model.visual.requires_grad_(False)
        return finished
    path = out / "tower.pt"
    if not path.exists():
        raise SystemExit(f"no vision tower: {path}; make it with: python -m pocket.recipe.qwen.train_tower --out {out}")
    tokenizer = load_tokenizer(out)
    model = fresh(tokenizer, seed)
    model.model.visual.load_state_dict(torch.load(path, weights_only=True)["visual"])
    take_over(model, tokenizer, load_pretrained(TEACHER, dtype="float32")[0], Tokenizer(TEACHER))
    model.model.visual.requires_grad_(False)
    return model


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, steps=940)
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--start", type=Path, help="train a finished model (pocket/qwen2vl) further")
    args = parser.parse_args()
    begin(args, "train.log")
    if args.start is not None:
        for name in FILES:
            shutil.copy(args.start / name, args.out / name)
    model = start_model(args.out, args.seed, args.start)
    plan = PLAN if args.start is None else FURTHER
    run = Run(args.out, model, Qwen(args.out), plan, args.steps, args.seed)
    if args.resume:
        run.load()
    if args.compile:
        compile_layers(model)
    log.info(json.dumps({"parameters": parameter_count(model), "from": run.step, "steps": run.steps}))
    train(run)


if __name__ == "__main__":
    main()

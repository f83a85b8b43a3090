"""All steps from scratch to `pocket/llava`, `pocket/qwen2vl`, their data and their measurement.

python -m pocket.recipe
python -m pocket.recipe --resume    (skips finished steps; an interrupted training resumes)

Tokenizers and vision towers, training, export, data files, evaluation: about three hours on two cores. The drafts are
made afterwards by pocket/recipe/train_draft.sh.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from llava.arguments import OneLineParser
from llava.errors import run_cli

HERE = Path(__file__).resolve().parents[1]
BUILD = HERE / "build"
LLAVA, QWEN, DATA = HERE / "llava", HERE / "qwen2vl", HERE / "data"
HELDOUT, IMAGES, TEXTS = 150, 200, 100


@dataclass(frozen=True)
class Step:
    """A module with its arguments. If `checkpoint` (the file of a started training) exists, it takes --resume."""

    name: str
    arguments: tuple[str, ...]
    checkpoint: Path | None = None

    def command(self, resume: bool) -> list[str]:
        """The arguments of Python."""
        resumes = resume and self.checkpoint is not None and self.checkpoint.exists()
        return ["-m", f"pocket.recipe.{self.name}", *self.arguments, *["--resume"] * resumes]


def steps(build: Path = BUILD) -> list[Step]:
    """All of them in order."""
    more, qwen, qwen_more = build / "more", build / "qwen", build / "qwen-more"
    heldout = f"{DATA}/heldout.jsonl"
    counts = ("--images", str(IMAGES), "--texts", str(TEXTS), "--heldout", str(HELDOUT))
    return [
        Step("train_tower", ("--out", str(build))),
        Step("train_target", ("--out", str(build)), build / "checkpoint.pt"),
        Step("export", ("--checkpoint", str(build), "--out", str(LLAVA))),
        Step("train_target", ("--out", str(more), "--start", str(LLAVA), "--steps", "1100"), more / "checkpoint.pt"),
        Step("export", ("--checkpoint", str(more), "--out", str(LLAVA))),
        Step("make_data", ("--out", str(DATA), *counts)),
        Step("evaluate", ("--model", str(LLAVA), "--data", heldout, "--exchange")),
        Step("qwen.train_tower", ("--out", str(qwen)), qwen / "tower.pt"),
        Step("qwen.train_target", ("--out", str(qwen)), qwen / "checkpoint.pt"),
        Step("qwen.export", ("--checkpoint", str(qwen), "--out", str(QWEN))),
        Step(
            "qwen.train_target",
            ("--out", str(qwen_more), "--start", str(QWEN), "--steps", "300"),
            qwen_more / "checkpoint.pt",
        ),
        Step("qwen.export", ("--checkpoint", str(qwen_more), "--out", str(QWEN))),
        Step("evaluate", ("--model", str(QWEN), "--data", heldout, "--exchange")),
    ]


def main() -> None:
    """Command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    if not args.resume:
        for old in BUILD.glob("step-*.done"):
            old.unlink()
    for number, step in enumerate(steps()):
        done = BUILD / f"step-{number}.done"
        if args.resume and done.exists():
            continue
        ended = subprocess.run([sys.executable, *step.command(args.resume)], cwd=HERE.parent, check=False)
        if ended.returncode:
            raise SystemExit(f"error: {step.name} ended with status {ended.returncode}")
        done.touch()


if __name__ == "__main__":
    sys.exit(run_cli(main))

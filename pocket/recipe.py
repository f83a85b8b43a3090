"""All steps from nothing to `pocket/llava`, its data and its measurement: python -m pocket.recipe

Tokenizer and vision tower (9 minutes on two cores), training (an hour), export, data files, evaluation. An interrupted
recipe goes on where the training stopped: python -m pocket.recipe --resume
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELDOUT, IMAGES, TEXTS = 150, 200, 100


def commands(steps: int, resume: bool, compiled: bool) -> list[list[str]]:
    """The arguments of every step, in order."""
    build, llava, data = str(HERE / "build"), str(HERE / "llava"), str(HERE / "data")
    tower = [] if resume else [["pocket.train_tower", "--out", build]]
    train = ["pocket.train_target", "--out", build, "--steps", str(steps)]
    train += ["--resume"] * resume + ["--compile"] * compiled
    counts = ["--images", str(IMAGES), "--texts", str(TEXTS), "--heldout", str(HELDOUT)]
    return [
        *tower,
        train,
        ["pocket.export", "--checkpoint", build, "--out", llava],
        ["pocket.make_data", "--out", data, *counts],
        ["pocket.evaluate", "--model", llava, "--data", f"{data}/heldout.jsonl", "--exchange"],
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    args = parser.parse_args()
    for command in commands(args.steps, args.resume, args.compile):
        done = subprocess.run([sys.executable, "-m", *command], cwd=HERE.parent, check=False)
        if done.returncode:
            raise SystemExit(f"error: {command[0]} ended with status {done.returncode}")


if __name__ == "__main__":
    main()

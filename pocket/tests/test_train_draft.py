"""`pocket/recipe/train_draft.sh` passes its settings on and puts the draft where it is asked to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$RECORD"
"""
FILES = ("config.json", "model.safetensors", "provenance.json")


def start(folder: Path, *flags: str, **settings: str) -> list[str]:
    """Runs the script with recorders in the place of python and deepspeed; gives the command lines."""
    for name in ("python", "deepspeed"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    final = folder / "build" / "checkpoints" / "final"
    final.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (final / name).write_text(f"new {name}")
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    own = {"PYTHON": str(folder / "python"), "RECORD": str(folder / "record"), "BUILD": str(folder / "build")}
    script = ["bash", str(REPO / "pocket" / "recipe" / "train_draft.sh"), *flags]
    subprocess.run(script, env={**kept, **own, **settings}, check=True, timeout=120, capture_output=True)
    return (folder / "record").read_text().splitlines()


@pytest.mark.parametrize("target", ["llava", "qwen2vl"])
def test_the_draft_goes_to_out_with_what_made_it(tmp_path: Path, target: str) -> None:
    shipped = {path: path.read_bytes() for path in (REPO / "pocket" / f"{target}-msd").iterdir()}
    *_, training = start(tmp_path, "--epochs", "2", TARGET=target, OUT=str(tmp_path / "out" / "draft"))
    assert f"--config pocket_{target}_config.json" in training and training.endswith("--resume --epochs 2")
    assert {path.name: path.read_text() for path in (tmp_path / "out" / "draft").iterdir()} == {
        name: f"new {name}" for name in FILES
    }
    assert {path: path.read_bytes() for path in (REPO / "pocket" / f"{target}-msd").iterdir()} == shipped


def test_states_only_trains_nothing(tmp_path: Path) -> None:
    assert not any(line.startswith("deepspeed") for line in start(tmp_path, STATES_ONLY="1", OUT=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()

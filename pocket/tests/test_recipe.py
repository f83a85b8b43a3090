"""The recipe runs its steps in order, resumes where it stopped, and takes only modules that are there."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pocket.recipe import __main__ as recipe


class Ran:
    """Stands for subprocess.run: remembers commands, fails at one."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.commands = fail, []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command[2:])
        return subprocess.CompletedProcess(command, int(command[2] == self.fail))


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recipe, "BUILD", tmp_path)
    return tmp_path


def start(monkeypatch: pytest.MonkeyPatch, ran: Ran, *flags: str) -> None:
    monkeypatch.setattr(recipe.subprocess, "run", ran)
    monkeypatch.setattr(sys, "argv", ["recipe", *flags])
    recipe.main()


def test_every_step_is_a_module() -> None:
    assert all(find_spec(f"pocket.recipe.{step.name}") for step in recipe.steps())


def test_an_interrupted_recipe_resumes(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Ran(fail="pocket.recipe.qwen.train_tower")
    with pytest.raises(SystemExit, match=r"qwen\.train_tower ended with status 1"):
        start(monkeypatch, first)
    names = [f"pocket.recipe.{step.name}" for step in recipe.steps()]
    failed = names.index("pocket.recipe.qwen.train_tower")
    assert [command[0] for command in first.commands] == names[: failed + 1]
    assert not any("--resume" in command for command in first.commands)

    rest = Ran()
    start(monkeypatch, rest, "--resume")
    assert [command[0] for command in rest.commands] == names[failed:]


def test_a_training_resumes_only_if_it_has_begun(tmp_path: Path) -> None:
    step = recipe.Step("train_target", ("--out", "x"), tmp_path / "checkpoint.pt")
    assert "--resume" not in step.command(resume=True)
    step.checkpoint.touch()
    assert step.command(resume=True)[-1] == "--resume" and "--resume" not in step.command(resume=False)

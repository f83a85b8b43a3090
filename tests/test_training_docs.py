"""docs/training.md says what the code has: keys with their defaults, shipped configs, commands with real flags."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import eagle.train
from eagle.train.main_deepspeed import parse_args
from eagle.train.schedule import image_probability
from eagle.train.settings import settings
from experiments import simulated_tau, training_cost, training_study

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "training.md").read_text(encoding="utf-8")


def test_every_key_has_its_default():
    told = dict(re.findall(r"^\| `(\w+)` \| ([\d.e-]+) \| .{8,} \|$", PAGE, re.MULTILINE))
    assert told == {name: str(info.default) for name, info in settings().items()}


def test_every_shipped_config_is_named():
    assert [
        path.name for path in Path(eagle.train.__file__).parent.glob("*.json") if f"`{path.name}`" not in PAGE
    ] == []


def test_links_and_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("http")]
    named = re.findall(r"`(?:EAGLE/)?(eagle/[\w/]+\.py)`", PAGE)
    assert links and named
    assert all((REPO / "docs" / link).exists() for link in links)
    assert all((REPO / "EAGLE" / name).is_file() for name in named)
    assert {path.name for path in (REPO / "scripts").glob("*.sh")} == set(re.findall(r"scripts/(\d_\w+\.sh)", PAGE))


def test_training_commands_parse():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks if "main_deepspeed.py" in block]
    assert commands
    assert all(parse_args(words[words.index("main_deepspeed.py") + 1 :]).cpdir == "CKPT" for words in commands)


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`(python -m benchmarks\.[^`]+)`", PAGE))))
def test_benchmark_commands_parse(line, monkeypatch):
    _, _, module, *argv = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [module, *argv])
    assert importlib.import_module(module) in (training_study, simulated_tau, training_cost)
    assert importlib.import_module(module).parse_args()


def test_the_curricula_are_those_of_the_table():
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]*) ?\| ([\d.]*) ?\|$", PAGE, re.MULTILINE)
    shares = {name: [image_probability(e, 4, *(float(value or 0) for value in values)) for e in range(4)]
              for name, *values in rows}  # fmt: skip
    assert shares == {
        "two stages, as published": [0, 0, 0.5, 1], "text alone, as many steps": [0] * 4,
        "pictures alone, as many steps": [1] * 4, "mixed from the start": [0.5] * 4}  # fmt: skip

"""`--help` answers at once: no parser imports torch, transformers or another heavy package."""

from __future__ import annotations

import subprocess
import sys

import pytest
from repository import REPO

from eagle.cli import COMMANDS

HEAVY = {"torch", "transformers", "deepspeed", "matplotlib", "accelerate", "datasets", "rich", "starlette"}
SCRIPT = """
import runpy, sys
kind, name, *argv = sys.argv[1:]
sys.argv = [name, *argv]
try:
    runpy.run_module(name, run_name="__main__") if kind == "-m" else runpy.run_path(name, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("\\nLOADED", *sorted({module.partition(".")[0] for module in sys.modules}))
"""
DATA = [f"eagle.ge_data.{name}" for name in ("download", "convert", "allocation", "vocabulary", "inspect")]
CALLS = [
    ("-m", "eagle.cli", "--help"),
    *(("-m", "eagle.cli", command, "--help") for command in COMMANDS),
    *(("-m", module, "--help") for module in (*DATA, "eagle.questions")),
    ("", "EAGLE/eagle/train/main_deepspeed.py", "--help"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call[1:-1]))
def test_help_imports_nothing_heavy(call: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *call], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown, _, loaded = done.stdout.partition("\nLOADED ")
    assert "usage:" in shown
    assert HEAVY & set(loaded.split()) == set()

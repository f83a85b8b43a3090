"""Examples in docstrings say what the code does."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = (
    "LLaVA/llava",
    "EAGLE/eagle",
    "lmms-eval/lmms_eval_msd",
    "serving/msd_vllm",
    "benchmarks",
    "experiments",
    "pocket",
)


def modules_with_examples() -> list[str]:
    """Names of the modules that have a doctest."""
    found = []
    for package in PACKAGES:
        parent = (REPO / package).parent
        for path in sorted((REPO / package).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8") and "tests" not in path.parts:
                found.append(".".join(path.relative_to(parent).with_suffix("").parts))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


def test_there_are_examples() -> None:
    assert len(modules_with_examples()) > 20

"""docs/evaluation.md names every model, flag, argument and result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagle import Stats
from lmms_eval_msd import MODELS, hook, options, report

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
ARGUMENTS = {*options.TREE, *options.LOADING, *options.LLAVA_PROMPTS, *options.QWEN_PROMPTS, *options.OWN}


@pytest.mark.parametrize("name", sorted({*MODELS, *hook.FLAGS, *ARGUMENTS} - {"pretrained", "batch_size", "device"}))
def test_names(name):
    assert f"`{name}`" in TEXT or f"`--{name}" in TEXT


def test_results():
    settings = dict.fromkeys(("use_msd", "base", "draft", "dtype", "tree", "batch_size", "processes"))
    built = report.build({"a": Stats(3, 1, 1, 1.0, [1], [2])}, settings, torch.device("cpu"))
    for key in (*built, *built["total"]):
        assert f"`{key}`" in TEXT or f"`….{key}`" in TEXT or f"`{key}." in TEXT, key

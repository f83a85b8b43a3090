"""Any JSON value at any key of a draft's config: one line, or a draft with which answers stay the base model's."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from json_paths import key_paths, replaced
from tiny_draft import make_draft
from tiny_llava import make_llava_hf
from tiny_stock import make_qwen

from eagle import MSDModel, TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import Target, load_target
from eagle.train.settings import read_config
from llava.errors import UserError

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**7, 10**20, 0.5, -0.5, 1e300, "", "x", "auto", [], [1], [[]], {}, {"a": 1},
)  # fmt: skip
MORE: dict[str, Any] = {
    "msd": {"positions": "plain", "head_tokens": None, "decoupled": True, "image_tokens": None, "image_merge": "pool",
            "layer_size": None},
    "rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 10000.0}, "bias": True,
    "hidden_act": "silu", "head_dim": 8, "text_config": {"rope_scaling": {}}, "torch_dtype": "float32",
    "train": {"epochs": 1, "learning_rate": 1e-4, "seed": 3},
}  # fmt: skip
MAKERS = {"llava": make_llava_hf, "qwen2_vl": make_qwen}


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    target = load_target(MAKERS[request.param](folder / "base"), dtype=torch.float32)
    return target, make_draft(folder / "draft", target, agree=1.0)


def check(pair: tuple[Target, Path], count: int) -> tuple[int, int]:
    target, folder = pair
    path = folder / "config.json"
    whole = path.read_text()
    config = {**MORE, **json.loads(whole)}
    inputs = target.prepare(target.chat_prompt("Name two rivers."))
    expected = target.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    choices = [(place, odd) for place in key_paths(config) for odd in ODD]
    ran = refused = 0
    try:
        for place, odd in Random(0).sample(choices, min(count, len(choices))):
            path.write_text(json.dumps(replaced(config, place, odd)))
            for read in (read_config, load_draft):
                try:
                    found: Any = read(path if read is read_config else folder)
                    if read is load_draft:
                        msd = MSDModel(target, found.float(), TreeConfig(2, 2, 6))
                        output = msd.generate(**inputs, max_new_tokens=6, temperature=0.0)
                        assert torch.equal(output.sequences, expected)
                        ran += 1
                except UserError as error:
                    assert "\n" not in str(error)
                    refused += 1
                except Exception as error:
                    raise AssertionError(f"{read.__name__}: {place} = {odd!r}") from error
    finally:
        path.write_text(whole)
    return ran, refused


def test_any_value_at_any_key_is_a_line_or_a_run(pair: tuple[Target, Path]) -> None:
    ran, refused = check(pair, 40)
    assert ran > 5 and refused > 5


@pytest.mark.slow
def test_every_value_at_every_key(pair: tuple[Target, Path]) -> None:
    ran, refused = check(pair, 2000)
    assert ran > 100 and refused > 200

"""The training configs of the real models fit the published drafts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import eagle.train
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel

WEIGHTS = {
    "llava_v15_7B_config.json": 367_009_792,
    "llava_v15_13B_config.json": 533_473_280,
    "qwen2vl_config.json": 803_748_864,
}
"""Of the published drafts, with their copies of the token embedding."""


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_trained_draft_has_as_many_weights_as_the_published_one(name: str) -> None:
    config = json.loads((Path(eagle.train.__file__).parent / name).read_text(encoding="utf-8"))
    with torch.device("meta"):
        draft = DraftModel(DraftConfig.from_dict({key: value for key, value in config.items() if key != "train"}))
    assert sum(parameter.numel() for parameter in draft.parameters()) == WEIGHTS[name]

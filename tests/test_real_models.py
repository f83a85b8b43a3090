"""The training configs of the real models fit the published drafts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import eagle.train
from eagle.doctor.memory import PUBLISHED
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel

CONFIGS = {
    "LLaVA-1.5-7B": "llava_v15_7B_config.json",
    "LLaVA-1.5-13B": "llava_v15_13B_config.json",
    "Qwen2-VL-7B": "qwen2vl_config.json",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_trained_draft_has_as_many_weights_as_the_published_one(name: str) -> None:
    config = json.loads((Path(eagle.train.__file__).parent / CONFIGS[name]).read_text(encoding="utf-8"))
    with torch.device("meta"):
        draft = DraftModel(DraftConfig.from_dict({key: value for key, value in config.items() if key != "train"}))
    assert sum(parameter.numel() for parameter in draft.parameters()) == PUBLISHED[name].draft

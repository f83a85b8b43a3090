"""EAGLE-3 and ViSpec heads and assistants on pretended GPUs: no devices are mixed, answers are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from pretended_gpu import PretendedGPU
from tiny_assistant import make_assistant
from tiny_eagle3 import make_eagle3
from tiny_families import make_gemma4
from tiny_llava import make_image
from tiny_vispec import make_vispec

from eagle import MSDModel, TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import Target, family_named, load_target

from .conftest import GPU, Pair, moved

TREE = TreeConfig(2, 4, 12)
HEADS: dict[str, Callable[[Path, Target], Path]] = {
    "eagle3 with the target's embedding": make_eagle3,
    "eagle3 with the target's head": lambda folder, target: make_eagle3(folder, target, drop=("lm_head.weight",)),
    "eagle3, window": lambda folder, target: make_eagle3(
        folder, target, "speculators", layer_types=["sliding_attention"], sliding_window=4
    ),
    "eagle3, features": lambda folder, target: make_eagle3(
        folder, target, msd={"image_rows": "feature", "positions": "temporal"}
    ),
    "vispec": make_vispec,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pair", ["qwen2_vl", pytest.param("llava", marks=pytest.mark.slow)], indirect=True)
def test_two_gpus(pair: Pair, tmp_path: Path, head: str) -> None:
    """The embedding on one, the target's head and the draft on the other."""
    folder = HEADS[head](tmp_path, pair.host.target)
    host = MSDModel(pair.host.target, load_draft(folder, dtype=torch.float32), TREE)
    prompts = (pair.inputs, pair.several)
    expected = [host.generate(**given, max_new_tokens=5, temperature=0.0).tokens for given in prompts]
    with PretendedGPU():
        target = load_target(pair.base, dtype=torch.float32)
        spread(target)
        draft = load_draft(folder, dtype=torch.float32, device=target.head_device)
        assert target.device == GPU != draft.device
        model = MSDModel(target, draft, TREE)
        for given, tokens in zip(prompts, expected, strict=True):
            assert model.generate(**moved(given), max_new_tokens=5, temperature=0.0).tokens == tokens


def test_an_assistant_reads_the_cache_of_its_gpu(tmp_path: Path) -> None:
    try:
        family_named("gemma4").target_class()
    except ImportError as error:  # an older transformers
        pytest.skip(str(error))
    base = make_gemma4(tmp_path / "base")
    own = make_assistant(base, tmp_path / "draft")
    host = MSDModel(load_target(base, dtype=torch.float32), load_draft(own, dtype=torch.float32), TREE)
    inputs = host.target.prepare(host.target.chat_prompt("How many?", num_images=1), [make_image()])
    expected = host.generate(**inputs, max_new_tokens=8, temperature=0.0).tokens
    with PretendedGPU():
        target = load_target(base, dtype=torch.float32)
        target.model.to(GPU)
        model = MSDModel(target, load_draft(own, dtype=torch.float32, device=GPU), TREE)
        assert "the draft is a Gemma 4 assistant head" in model.compile_note
        assert model.generate(**moved(inputs), max_new_tokens=8, temperature=0.0).tokens == expected


def spread(target: Target) -> None:
    """The first layers on one GPU, the last ones with the head on another."""
    layers = range(len(target.text_model.layers))
    places = {f"model.language_model.layers.{number}": int(number >= len(layers) / 2) for number in layers}
    first = [name for name, _ in target.model.model.named_children() if name != "language_model"]
    places |= {f"model.{name}": 0 for name in first} | {"model.language_model.embed_tokens": 0}
    places |= {"model.language_model.norm": 1, "model.language_model.rotary_emb": 1, "lm_head": 1}
    dispatch_model(target.model, places, main_device=0, force_hooks=True)

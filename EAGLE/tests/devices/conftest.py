"""Tiny pairs, each once on the CPU and once on a pretended GPU (`tests/support/pretended_gpu.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGPU
from tiny_draft import make_draft
from tiny_llava import make_image, make_llava_hf
from tiny_stock import make_qwen
from torch import Tensor

from eagle import MSDModel, TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target

BASES: dict[str, Callable[[Path], Path]] = {"llava": make_llava_hf, "qwen2_vl": make_qwen}
FIXED = TreeConfig(2, 24, 80)
ADAPTIVE = TreeConfig(2, 24, 80, adaptive=True)
GPU = torch.device("cuda", 0)


@dataclass
class Pair:
    """A tiny base with its draft. ``host``: both on the CPU, and ``inputs`` of one prompt with a picture, ``several``
    of that and a longer one without."""

    base: Path
    head: Path
    host: MSDModel
    inputs: dict[str, Tensor]
    several: dict[str, Tensor]

    def on_gpu(self, spread: Callable[[Any], None] | None = None, **settings: Any) -> MSDModel:
        """Both on ``cuda:0``, or the base where ``spread`` lays it and the draft where the base's head is."""
        target = load_target(self.base, dtype=torch.float32)
        if spread is None:
            target.model.to(GPU)
        else:
            spread(target.model)
        draft = load_draft(self.head, dtype=torch.float32, device=target.head_device)
        return MSDModel(target, draft, **{"tree": FIXED, **settings})


def moved(inputs: dict[str, Tensor], device: torch.device = GPU) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


@pytest.fixture(scope="session", params=BASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    base = BASES[request.param](folder / "base")
    head = make_draft(folder / "draft", load_target(base, dtype=torch.float32), agree=1.0)
    host = MSDModel.from_pretrained(base, head, dtype=torch.float32, tree=FIXED)
    ask, image = host.target.chat_prompt, make_image()
    inputs = host.target.prepare(ask("How many?", num_images=1), [image])
    several = host.target.prepare([ask("How many?", num_images=1), ask("Name two rivers and more words?")], [image])
    return Pair(base, head, host, dict(inputs), dict(several))


@pytest.fixture(scope="module")
def model(pair: Pair) -> MSDModel:
    """The pair on one pretended GPU."""
    with PretendedGPU():
        return pair.on_gpu()


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    with PretendedGPU() as pretended:
        yield pretended

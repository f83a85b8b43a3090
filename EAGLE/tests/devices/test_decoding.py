"""Decoding on a GPU mixes no devices: it runs on a pretended one, and says what it says on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from pretended_gpu import PretendedGPU

from eagle import MSDModel, TreeConfig
from eagle.decode.adaptive.planner import Acceptance
from eagle.drafts.compression import Compression

from .conftest import ADAPTIVE, GPU, Pair, moved

TOKENS = 5
SECOND = torch.device("cuda", 1)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.0, "use_msd": False},
    "adaptive": {"temperature": 0.0, "tree": ADAPTIVE},
    "sampled": {"temperature": 1.0},
    "seed": {"temperature": 1.0, "seed": 3, "tree": ADAPTIVE},
    "top-k, top-p": {"temperature": 1.0, "seed": 3, "top_k": 20, "top_p": 0.9},
    "penalty": {"temperature": 0.0, "repetition_penalty": 1.2, "min_new_tokens": 4},
    "penalty, sampled": {"temperature": 1.0, "repetition_penalty": 1.2, "seed": 3},
    "stop string": {"temperature": 0.0, "stop_strings": ["no such text"]},
    "no image rows": {"temperature": 0.0, "compression": Compression(0)},
    "pooled": {"temperature": 0.0, "compression": Compression(2)},
}  # fmt: skip
TREE = TreeConfig(5, 4, 15)  # by default those of a batch are larger on a GPU
BATCHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "tree": TREE},
    "seeds": {"temperature": 1.0, "seed": [3, 5], "tree": TREE},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.2, "seed": [3, 5], "tree": TREE},
}
ONE = [("llava", name) for name in SETTINGS]
ONE += [("qwen2_vl", name) for name in ("greedy", "seed", "penalty, sampled", "pooled")]
TWO = [("llava", name) for name in ("adaptive", "top-k, top-p", "penalty, sampled", "pooled")]
TWO += [("qwen2_vl", name) for name in ("seed", "pooled")]


class Listener:
    """A streamer that keeps what it is given; it takes nothing but tensors of the host, as transformers' own."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        assert value.device == torch.device("cpu")
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.heard.append(-1)


def answer(
    model: MSDModel, inputs: dict[str, torch.Tensor], compression: Compression | None = None, **settings: Any
) -> tuple[list[list[int]], list[int]]:
    """New ids of each sequence, which must be where the prompt is, and how many drafted ones each cycle accepted."""
    torch.manual_seed(1)
    model.compression, model._acceptance = compression or Compression(), Acceptance()  # nothing learnt before
    output = model.generate(**inputs, max_new_tokens=TOKENS, **settings)
    assert output.sequences.device == inputs["input_ids"].device
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), output.stats.accept_lengths


@pytest.fixture(scope="module")
def spread(pair: Pair) -> MSDModel:
    """The pair on two: as accelerate lays out a base that is too large for one."""

    def lay(base: Any) -> None:
        layers = range(len(base.model.language_model.layers))
        places = {f"model.language_model.layers.{number}": number >= len(layers) / 2 for number in layers}
        first = [name for name, _ in base.model.named_children() if name != "language_model"]
        places |= {f"model.{name}": 0 for name in first} | {"model.language_model.embed_tokens": 0}
        places |= {"model.language_model.norm": 1, "model.language_model.rotary_emb": 1, "lm_head": 1}
        dispatch_model(base, {name: int(place) for name, place in places.items()}, main_device=0, force_hooks=True)

    with PretendedGPU():
        return pair.on_gpu(lay)


@pytest.mark.parametrize(("pair", "name"), ONE, indirect=["pair"])
def test_one_gpu(pair: Pair, model: MSDModel, gpu: PretendedGPU, name: str) -> None:
    assert model.draft is not None and model.target.device == model.draft.device == GPU
    on_host = answer(pair.host, pair.inputs, **SETTINGS[name])
    assert answer(model, moved(pair.inputs), **SETTINGS[name]) == on_host


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_on_one_gpu(pair: Pair, model: MSDModel, gpu: PretendedGPU, name: str) -> None:
    assert answer(model, moved(pair.several), **BATCHES[name]) == answer(pair.host, pair.several, **BATCHES[name])


def test_a_streamer_hears_the_host(pair: Pair, model: MSDModel, gpu: PretendedGPU) -> None:
    listener = Listener()
    output = model.generate(**moved(pair.inputs), max_new_tokens=TOKENS, temperature=0.0, streamer=listener)
    assert listener.heard == [*output.sequences[0].tolist(), -1]


@pytest.mark.parametrize(("pair", "name"), TWO, indirect=["pair"])
def test_two_gpus(pair: Pair, spread: MSDModel, gpu: PretendedGPU, name: str) -> None:
    """The prompt goes to the embedding's device, the draft to the head's; layers are on both."""
    layers = [next(layer.parameters()).device for layer in spread.target.text_model.layers]
    assert spread.draft is not None and set(layers) == {GPU, SECOND}
    assert spread.target.device == GPU and spread.draft.device == spread.target.head_device == SECOND
    assert answer(spread, moved(pair.inputs), **SETTINGS[name]) == answer(pair.host, pair.inputs, **SETTINGS[name])
    assert gpu.transfers


@pytest.mark.parametrize("name", ["seeds"])
def test_a_batch_on_two_gpus(pair: Pair, spread: MSDModel, gpu: PretendedGPU, name: str) -> None:
    assert answer(spread, moved(pair.several), **BATCHES[name]) == answer(pair.host, pair.several, **BATCHES[name])

"""How often a cycle waits for the GPU: copies to the host, numbers that are read, copies of small lists to the GPU.

Counted on a pretended GPU, from the end of the prefill to the end of the answer (docs/speed.md).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGPU

from eagle import MSDModel
from eagle.decode.decoder import Decoder

from .conftest import ADAPTIVE, Pair, moved

TOKENS = 10
pytestmark = pytest.mark.parametrize("pair", ["llava"], indirect=True)  # the families share these parts


class Cycles:
    """What the cycles of an answer did. ``waits``: by kind; ``places``: for messages; ``count``: cycles, of all
    sequences together one; ``levels``: of the draft tree that an adapting tree was asked about; ``new``: tokens."""

    def __init__(self, gpu: PretendedGPU, patch: pytest.MonkeyPatch, model: MSDModel, settings: dict[str, Any]) -> None:
        self.count, self.levels, self.drafted, self.places = 0, 0, 0, Counter[str]()
        prefill, draft, run, deepen = Decoder.prefill, Decoder.draft, Decoder._run, Decoder._should_deepen

        def counted_prefill(decoder: Decoder) -> None:
            prefill(decoder)
            gpu.forget()

        def counted_draft(decoder: Decoder, *given: Any) -> Any:
            self.count += 1
            drafted = draft(decoder, *given)
            self.drafted += max(tree.size for tree in drafted.trees) > 1
            return drafted

        def counted_deepen(decoder: Decoder, scores: Any) -> bool:
            self.levels += 1
            return deepen(decoder, scores)

        def counted_run(decoder: Decoder) -> Any:
            tokens = run(decoder)
            self.places.update(gpu.waits)
            self.new = sum(map(len, tokens)) - len(tokens)  # but for the prefill's
            return tokens

        patch.setattr(Decoder, "prefill", counted_prefill)
        patch.setattr(Decoder, "draft", counted_draft)
        patch.setattr(Decoder, "_should_deepen", counted_deepen)
        patch.setattr(Decoder, "_run", counted_run)
        self.accepted = model.generate(max_new_tokens=TOKENS, **settings).stats.accept_lengths
        self.waits: Counter[str] = Counter()
        for place, count in self.places.items():
            self.waits[place.split(":")[0]] += count

    def by_kind(self, *kinds: str) -> tuple[int, ...]:
        return tuple(self.waits[kind] for kind in kinds)

    def show(self) -> str:
        return f"{self.count} cycles: " + ", ".join(f"{count} {place}" for place, count in sorted(self.places.items()))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 1, "top_p": 0.9}], ids=str)
def test_a_fixed_tree(
    pair: Pair, model: MSDModel, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """One copy to the host. To the GPU go the root, the accepted path, its tokens for the draft and their number, and
    the rows of the cache that move."""
    cycles = Cycles(gpu, monkeypatch, model, {**moved(pair.inputs), **settings})
    assert cycles.by_kind("to host", "number", "size") == (cycles.count, 0, 0), cycles.show()
    several = sum(length > 0 for length in cycles.accepted)
    assert cycles.waits["to GPU"] <= 4 * cycles.count + several, cycles.show()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 1, "top_p": 0.9}], ids=str)
def test_compiled_cycles(
    pair: Pair, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """One copy to the host, which is not waited for before the next cycle is launched, and nothing else. Each cycle is
    waited for once. Functions are not compiled here."""
    order = list[str]()

    class Event:
        def record(self) -> None:
            order.append("launched")

        def synchronize(self) -> None:
            order.append("waited")

    follow, waits = Decoder._follow, Counter[str]()

    def counted(decoder: Decoder, *given: Any) -> Any:
        gpu.forget()
        result = follow(decoder, *given)
        waits.update(gpu.waits)
        return result

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Decoder, "_follow", counted)
    model = pair.on_gpu(compile="eager")
    model.warm_up(progress=False)
    found = model.generate(**moved(pair.inputs), max_new_tokens=2 * TOKENS, **settings)
    assert found.tokens == pair.host.generate(**pair.inputs, max_new_tokens=2 * TOKENS, **settings).tokens
    assert order[:4] == ["launched", "launched", "waited", "launched"]
    assert order.count("waited") >= found.stats.cycles - 1 > 3  # the last may be a plain one
    assert {place.split(":")[0] for place in waits} == {"to host"}, waits
    assert sum(waits.values()) == order.count("launched") <= found.stats.cycles + 1


def test_plain_decoding(pair: Pair, model: MSDModel, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    cycles = Cycles(gpu, monkeypatch, model, {**moved(pair.inputs), "temperature": 0.0, "use_msd": False})
    assert cycles.by_kind("to host", "number", "size") == (cycles.count, 0, 0), cycles.show()
    assert cycles.waits["to GPU"] <= cycles.count, cycles.show()


def test_a_tree_that_adapts(pair: Pair, model: MSDModel, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more copy to the host for each level that is asked about, and one for the size of a tree."""
    settings = {"temperature": 0.0, "tree": ADAPTIVE}
    cycles = Cycles(gpu, monkeypatch, model, {**moved(pair.inputs), **settings})
    assert cycles.levels > 0, cycles.show()
    own = cycles.waits["to host"] - cycles.count - cycles.levels
    assert cycles.drafted <= own <= cycles.count and cycles.waits["number"] == cycles.waits["size"] == 0, cycles.show()
    assert cycles.waits["to GPU"] <= 5 * cycles.count, cycles.show()


def test_processors_of_earlier_tokens(
    pair: Pair, model: MSDModel, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tree's tokens and parents go to the host, and whether the output is a number; then one number for each new
    token, whose path goes to the GPU before it."""
    settings = {"temperature": 0.0, "no_repeat_ngram_size": 3}
    cycles = Cycles(gpu, monkeypatch, model, {**moved(pair.inputs), **settings})
    assert cycles.waits["to host"] <= 2 * cycles.count and cycles.waits["size"] == 0, cycles.show()
    chosen = sum(length + 1 for length in cycles.accepted)
    assert cycles.waits["number"] <= cycles.count + chosen, cycles.show()
    assert cycles.waits["to GPU"] <= 5 * cycles.count + chosen, cycles.show()


def test_repetition_penalty(pair: Pair, model: MSDModel, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks which tokens come before, for all nodes at once: one copy to the host, and none more than without for a
    token."""
    settings = {"temperature": 0.0, "repetition_penalty": 1.2}
    cycles = Cycles(gpu, monkeypatch, model, {**moved(pair.inputs), **settings})
    assert cycles.waits["to host"] == cycles.count, cycles.show()
    assert cycles.waits["number"] == cycles.waits["size"] == 0, cycles.show()
    assert cycles.waits["to GPU"] <= 6 * cycles.count, cycles.show()


def test_stop_strings(pair: Pair, model: MSDModel, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' criterion is asked on the host. Only the first cycles copy the prompt's last tokens, which may
    begin such a text."""
    text = "no such text"
    settings = {"temperature": 0.0, "stop_strings": [text]}
    cycles = Cycles(gpu, monkeypatch, model, {**moved(pair.inputs), **settings})
    assert cycles.count <= cycles.waits["to host"] <= cycles.count + len(text), cycles.show()
    assert cycles.waits["number"] == cycles.waits["size"] == 0, cycles.show()
    assert cycles.waits["to GPU"] <= 5 * cycles.count, cycles.show()


def test_a_batch(pair: Pair, model: MSDModel, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Still one copy to the host; more lists of numbers go to the GPU, some for each forward of the draft."""
    cycles = Cycles(gpu, monkeypatch, model, {**moved(pair.several), "temperature": 0.0})
    assert cycles.by_kind("to host", "number", "size") == (cycles.count, 0, 0), cycles.show()
    forwards = 2 + model.tree.depth  # verification, the accepted rows, and the levels
    assert cycles.waits["to GPU"] <= (8 + 3 * forwards) * cycles.count, cycles.show()

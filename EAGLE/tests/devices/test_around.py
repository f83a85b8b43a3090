"""What decodes and reads besides a plain answer mixes no devices: exactness, verify, costs, the training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGPU
from tiny_llava import make_image

from eagle import MSDModel, TreeConfig
from eagle.conversations import read_conversation
from eagle.decode.adaptive.cost import describe, measure
from eagle.exactness import SETTINGS, check_prompt, first_difference, noise_processors, significant
from eagle.families import Target, template_of
from eagle.families.template import Prepared
from eagle.ge_data.extract import source_of
from eagle.ge_data.reader import Reader
from eagle.ge_data.regenerate import Regenerator
from eagle.hidden_states.source import Regeneration

from .conftest import GPU, Pair, moved

TREE = TreeConfig(2, 3, 8)
LONGEST = 400


def test_exactness(pair: Pair, model: MSDModel, gpu: PretendedGPU) -> None:
    """The same counts as on the CPU, of every setting."""
    settings = {name: SETTINGS[name] for name in ("T 1.0", "T 0.7, top-k 20, top-p 0.9")}
    fits = check_prompt(model, moved(pair.inputs), TREE, 1500, settings=settings)
    assert {fit.setting for fit in fits} == set(settings) and significant(fits) == []
    on_host = check_prompt(pair.host, pair.inputs, TREE, 1500, settings=settings)
    assert [(fit.where, fit.nodes, fit.draws) for fit in fits] == [(f.where, f.nodes, f.draws) for f in on_host]


def test_verify_with_noise(pair: Pair, model: MSDModel, gpu: PretendedGPU) -> None:
    """transformers' search with MSD's noise says what MSD samples, noise and scores being on the GPU."""
    inputs, shared = moved(pair.inputs), {"max_new_tokens": 6}
    noisy = noise_processors(1.0, 5, inputs["input_ids"])
    expected = model.target.model.generate(**inputs, do_sample=False, logits_processor=noisy, **shared)
    actual = model.generate(**inputs, temperature=1.0, top_p=1.0, top_k=0, seed=5, **shared).sequences
    assert first_difference(expected[0], actual[0]) is None and actual.shape[1] > inputs["input_ids"].shape[1]


def test_costs(model: MSDModel, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle.decode.adaptive.cost.hardware", lambda device: {"gpu": str(device)})  # asks the driver
    assert model.draft is not None
    curve = measure(model.target, model.draft, TREE, context=8, rounds=1)
    assert curve.nodes[-1] == TREE.total_tokens and min(*curve.verify, curve.step, curve.extend) > 0
    described = describe(model.target, model.draft, TREE)
    assert (described["device"], described["devices"], described["hardware"]) == ("cuda", 1, {"gpu": str(GPU)})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a.png", "b.png")):
        make_image(tmp_path / name, 60 + 20 * seed, 60, seed)
    return tmp_path


def rows() -> list[dict[str, Any]]:
    """One with a picture, one without, of different length."""
    said = ("Which colours?", "Red and green.", "More?", "No.")
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    seen = [{"from": "human", "value": "<image>\nWhich colours?"}, *turns[1:]]
    return [{"id": "text", "conversations": turns}, {"id": "seen", "image": "a.png", "conversations": seen}]


def regenerated(model: MSDModel, pictures: Path, temperature: float) -> list[Prepared]:
    template = template_of(model.target)
    talks = [read_conversation(row, number, keep_answers=False) for number, row in enumerate(rows())]
    outlines = [template.outline(talk, pictures, LONGEST) for talk in talks]
    settings = Regeneration(None, None, temperature, seed=3, max_new_tokens=5)
    found = dict(Regenerator(model, template, settings, LONGEST, at_once=2).answered(outlines, [0, 1]))
    assert all(isinstance(ready, Prepared) for ready in found.values()) and len(found) == 2
    return [found[0], found[1]]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("pair", "temperature"), [("llava", 0.0), ("llava", 1.0), ("qwen2_vl", 1.0)], indirect=["pair"]
)
def test_regenerated_answers(
    pair: Pair, model: MSDModel, gpu: PretendedGPU, pictures: Path, temperature: float
) -> None:
    """The same ids as on the CPU, on the host, where the training data is."""
    on_gpu, on_host = (regenerated(each, pictures, temperature) for each in (model, pair.host))
    for one, other in zip(on_gpu, on_host, strict=True):
        assert one.input_ids.device == torch.device("cpu")
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.loss_mask, other.loss_mask)


def test_a_batch_of_samples_is_waited_for_once(
    pair: Pair, model: MSDModel, gpu: PretendedGPU, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies are sent behind the forward, which the host does not wait for: it knows all sizes."""
    template, prefill = template_of(model.target), Target.prefill
    items = [template.prepare(read_conversation(row, n), pictures, LONGEST) for n, row in enumerate(rows())]
    reader = Reader(model.target, template, source_of(model.target, str(pair.base), "int8"), 2000)

    def launched(*given: Any) -> Any:
        found = prefill(*given)
        gpu.forget()
        return found

    monkeypatch.setattr(Target, "prefill", launched)
    forward = reader._forward(items)
    assert gpu.waits == {"to host: reader.py __init__": 3}  # features, states, scales
    assert len(forward.samples) == len(items)
    assert gpu.waits == {"to host: reader.py __init__": 3, "stream: reader.py wait": 1}


def test_samples_for_training(pair: Pair, model: MSDModel, gpu: PretendedGPU, pictures: Path) -> None:
    """Hidden states of a padded batch, with its check, come to the host as the CPU computes them."""
    template = template_of(pair.host.target)
    talks = [read_conversation(row, number) for number, row in enumerate(rows())]
    items, read = [template.prepare(talk, pictures, LONGEST) for talk in talks], []
    for each in (model, pair.host):
        reader = Reader(each.target, template_of(each.target), source_of(each.target, str(pair.base)), 2000)
        read.extend(reader.read([items]))
        assert reader._padding_checked
    for one, other in zip(*read, strict=True):
        for name in ("hidden", "image_features", "image_mask", "input_ids"):
            value = getattr(one, name)
            assert type(value) is torch.Tensor and value.device == torch.device("cpu"), name
            torch.testing.assert_close(value, getattr(other, name), atol=1e-4, rtol=1e-4)

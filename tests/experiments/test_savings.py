"""`experiments.savings`: each saving can be taken back and comes back, and answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_llava_hf

from eagle import MSDModel, TreeConfig
from eagle import kv_cache as cache
from eagle.decode import decoder as decode
from eagle.decode import drafter, masks, tree
from eagle.drafts.msd import DraftModel
from eagle.families import load_target
from eagle.questions import Question
from experiments import savings
from experiments.ablations import WAYS
from llava.errors import UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("savings")
    target = load_target(make_llava_hf(folder / "base"), dtype=torch.float32)
    draft = make_draft(folder / "draft", target)
    return MSDModel.from_pretrained(folder / "base", draft, dtype=torch.float32, tree=TreeConfig(3, 2, 6))


@pytest.fixture
def question(tmp_path: Path) -> Question:
    make_image().save(tmp_path / "picture.png")
    return Question("q", "How many?", (tmp_path / "picture.png",), "")


def traits(pair: MSDModel) -> dict[str, Any]:
    """What the ways change, one entry for each of them."""
    assert pair.draft is not None
    found = [
        list(pair.draft.layer.self_attn.fused), pair.target.model.lm_head.weight.stride(), masks.MaskBuffer.window,
        drafter.Drafter._rope, cache.KVCache.keep, tree.ancestor_mask, decode.accept_all_at_once, DraftModel.forward,
    ]  # fmt: skip
    return dict(zip(WAYS, found, strict=True))


def test_each_way_takes_back_its_own_saving_alone_and_gives_it_back(pair: MSDModel) -> None:
    before = traits(pair)
    for name, way in WAYS.items():
        change = way(pair)
        for _ in range(2):  # more than once, as rounds do
            with change:
                assert {other for other, value in traits(pair).items() if value != before[other]} == {name}
            assert traits(pair) == before


def test_one_record_a_way(pair: MSDModel, question: Question) -> None:
    records = savings.measure(pair, [question], tokens=24, rounds=2, tolerance=10.0)
    assert [record["saving"] for record in records] == [savings.AS_IT_IS, *WAYS]
    assert records[0]["gain"] == 1.0 and all(record["cycle_ms"] > 0 for record in records)


def test_other_answers_are_an_error(pair: MSDModel, question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    from eagle.decode.accept import Accepted
    from experiments.ablations import patched

    wrong = patched((decode, "accept_all_at_once", lambda trees, chosen: [Accepted([0], [3]) for _ in trees]))
    monkeypatch.setitem(WAYS, "nothing", lambda pair: wrong)
    with pytest.raises(UserError, match="without 'nothing' the answers are others"):
        savings.measure(pair, [question], tokens=8, rounds=1, tolerance=10.0)

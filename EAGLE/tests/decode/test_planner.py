"""Depth and size of a tree by hand-made costs, and decoding that follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from tiny_stock import make_qwen

from eagle import MSDModel, TreeConfig
from eagle.decode.adaptive.guard import Work
from eagle.decode.adaptive.planner import Acceptance, CostCurve, Planner
from eagle.families import load_target
from llava.errors import UserError

FLAT = CostCurve(nodes=(1, 100), verify=(10.0, 10.0), step=1.0, extend=1.0)
STEEP = CostCurve(nodes=(1, 100), verify=(10.0, 1000.0), step=1.0, extend=1.0)  # 10 for each node


def log(*chances: float) -> np.ndarray:
    return np.log(np.array(chances))


def test_costs_are_linear_between_what_was_measured() -> None:
    cost = CostCurve((1, 3, 5), (2.0, 4.0, 10.0), 1.0, 1.0)
    assert cost.verification(6).tolist() == [2.0, 3.0, 4.0, 7.0, 10.0, 10.0]


def test_every_node_is_taken_where_nodes_are_free() -> None:
    planner = Planner(FLAT, largest=4)
    assert planner.should_draft()
    assert planner.size(log(0.9, 0.05)) == 3
    assert planner.size(log(0.9, 0.05, 0.04, 0.03, 0.02)) == 4  # the largest allowed


def test_only_nodes_that_pay_are_taken() -> None:
    """Seconds for n nodes: 1 + 10 n. One node: 1/11. Two: 1.9/21. Nothing pays. At 0.95: 1.95/21 > 1/11."""
    planner = Planner(STEEP, largest=10)
    assert planner.size(log(0.9, 0.5)) == 1
    assert planner.size(log(0.95, 0.5)) == 2


def test_another_level_is_drafted_while_it_pays() -> None:
    """Seconds: 1 + 10 for one level. Best after a level of mass 0.9: 1.9/11; the next promises 0.81: 2.71/12."""
    planner = Planner(FLAT, largest=10)
    planner.should_draft()
    assert planner.should_deepen(log(0.9))
    assert not Planner(FLAT, largest=10).should_deepen(log(0.1))  # 1.1/11 now, 1.11/12 then


def test_acceptance_is_learnt_by_range() -> None:
    acceptance = Acceptance()
    scores = log(0.5, 0.05)
    assert acceptance.probability(scores) == pytest.approx([0.5, 0.05])
    for _ in range(200):
        acceptance.learn(scores, [0])  # a node of 0.5 is always accepted, one of 0.05 never
    high, low = acceptance.probability(scores)
    assert high > 0.95
    assert low == pytest.approx(0.05 * 0.2, abs=0.005)
    assert acceptance.probability(log(0.7)) == pytest.approx([0.7])


def test_slower_phases_lead_to_other_trees() -> None:
    """Seconds: 1 + 10 for one level, 1 for another. If drafting takes 20 times as long, another level does not pay."""
    planner = Planner(FLAT, largest=10)
    for _ in range(4):
        decision = planner.should_draft()
        planner.learn(log(1.0, 0.9), [0, 1], 2, Work(20.0 * decision, 10.0), decision)
    planner.should_draft()
    assert not planner.should_deepen(log(0.9))  # 1.9/30 now, 2.71/50 then
    assert planner.size(log(0.9)) == 2


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planner") / "base"
    return make_liuhaotian(folder) if request.param == "llava" else make_qwen(folder)


@pytest.mark.parametrize("agree", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cost", [FLAT, STEEP, CostCurve((1, 32), (10.0, 60.0), 1.0, 2.0)])
def test_greedy_output_is_that_of_generate(base: Path, tmp_path: Path, agree: float, cost: CostCurve) -> None:
    target = load_target(base, dtype=torch.float32)
    draft = make_draft(tmp_path / "draft", target, agree=agree)
    msd = MSDModel.from_pretrained(base, draft, dtype=torch.float32, tree="auto")
    msd._costs = {(msd.tree.depth, msd.tree.top_k, msd.tree.total_tokens): cost}
    inputs = msd.target.prepare(msd.target.chat_prompt("How many?", num_images=1), [make_image()])
    wanted = target.model.generate(**inputs, max_new_tokens=60, do_sample=False)
    output = msd.generate(**inputs, max_new_tokens=60, temperature=0.0)
    assert torch.equal(output.sequences, wanted)
    sizes = set(output.stats.tree_sizes)
    if cost is STEEP and agree < 1:
        assert 1 in sizes
    if cost is FLAT:
        assert max(sizes) > 1


def test_a_draft_that_never_agrees_ends_in_plain_decoding(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cycle takes 10 seconds to verify, one that drafts 5 more."""
    learn = Planner.learn

    def at_these_costs(self: Planner, scores: Any, accepted: Any, tokens: int, real: Work, drafted: bool) -> None:
        learn(self, scores, accepted, tokens, Work(5.0 * drafted, 10.0), drafted)

    monkeypatch.setattr(Planner, "learn", at_these_costs)
    draft = make_draft(tmp_path / "draft", load_target(base, dtype=torch.float32), agree=0.0)
    msd = MSDModel.from_pretrained(base, draft, dtype=torch.float32, tree="auto")
    msd._costs = {(msd.tree.depth, msd.tree.top_k, msd.tree.total_tokens): CostCurve((1, 32), (10.0, 10.0), 2.0, 3.0)}
    inputs = msd.target.prepare(msd.target.chat_prompt("How many?"), [])
    stats = msd.generate(**inputs, max_new_tokens=64, temperature=0.0, eos_token_id=None).stats
    assert stats.tree_sizes.count(1) > 40


def test_batches_take_a_fixed_tree(base: Path, tmp_path: Path) -> None:
    draft = make_draft(tmp_path / "draft", load_target(base, dtype=torch.float32), agree=1.0)
    msd = MSDModel.from_pretrained(base, draft, dtype=torch.float32, tree="auto")
    prompts = [msd.target.chat_prompt(text) for text in ("How many?", "Which colour has it?")]
    output = msd.generate(**msd.target.prepare(prompts), max_new_tokens=8, temperature=0.0)
    assert not msd._costs and output.stats.cycles


def test_which_tree_a_model_takes(base: Path) -> None:
    target = load_target(base, dtype=torch.float32)
    auto, fixed = TreeConfig.auto("cpu"), TreeConfig.for_device("cpu")
    assert auto.adaptive and not fixed.adaptive
    assert MSDModel(target).tree == MSDModel(target, tree="auto").tree == auto
    assert MSDModel(target, tree="fixed").tree == MSDModel(target, compile="eager").tree == fixed
    assert MSDModel(target, tree=TreeConfig(2, 2, 5)).tree == TreeConfig(2, 2, 5)
    assert MSDModel(target).tree_for(2) == fixed.for_batch(2, "cpu")
    with pytest.raises(UserError, match='give "auto", "fixed"'):
        MSDModel(target, tree="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", ["depth", "top_k", "total_tokens"])
def test_trees_are_bounded(bound: str) -> None:
    with pytest.raises(UserError, match=f"{bound}=.*at most"):
        TreeConfig.from_dict({bound: 10**30})

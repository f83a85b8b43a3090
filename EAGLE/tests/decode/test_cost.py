"""What a cycle costs: measured once, kept with everything that it depends on, within memory and time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_llava_hf

from eagle import MSDModel, TreeConfig
from eagle.decode.adaptive import cost as costs
from eagle.decode.adaptive.cost import cost_of, describe, key_of, measure, seconds_of
from eagle.decode.adaptive.planner import CostCurve
from eagle.families import load_target
from eagle.families.base import Target
from llava.errors import UserError

FLAT = CostCurve((1, 32), (10.0, 11.0), 1.0, 2.0)
TREE = TreeConfig(3, 2, 8, adaptive=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_hf(tmp_path_factory.mktemp("cost") / "base")


@pytest.fixture
def pair(base: Path, tmp_path: Path) -> MSDModel:
    target = load_target(base, dtype=torch.float32)
    return MSDModel.from_pretrained(base, make_draft(tmp_path / "draft", target, agree=1.0), dtype=torch.float32)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets verifications of more nodes than given find no room; prompts are not concerned."""

    def limit(nodes: int) -> None:
        verify = Target.verify

        def limited(self: Target, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
            if tokens.shape[1] > nodes:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return verify(self, tokens, *rest)

        monkeypatch.setattr(Target, "verify", limited)

    return limit


def test_costs_are_measured_once_and_recorded(
    pair: MSDModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    msd, tree = pair, TREE
    assert msd.draft is not None
    cost = cost_of(msd.target, msd.draft, tree)
    assert cost.nodes == (1, 2, 3, 4, 6, 8)
    assert min(*cost.verify, cost.step, cost.extend) > 0
    (record,) = (tmp_path / "cache" / "costs").iterdir()
    assert record.stem == key_of(describe(msd.target, msd.draft, tree))

    monkeypatch.setattr(costs, "measure", lambda *_: pytest.fail("measured again"))
    assert cost_of(msd.target, msd.draft, tree) == cost

    monkeypatch.setattr(costs, "measure", lambda *_: FLAT)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "file"))  # cannot be a folder: measured, and nothing fails
    assert cost_of(msd.target, msd.draft, tree) == FLAT
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))

    for broken in ("{", json.dumps({"schema": 1}), json.dumps({**json.loads(record.read_text()), "schema": 99})):
        record.write_text(broken)
        monkeypatch.setattr(costs, "measure", lambda *_: FLAT)
        assert cost_of(msd.target, msd.draft, tree) == FLAT
        assert json.loads(record.read_text())["seconds"]["step"] == 1.0


def test_the_record_is_of_everything_that_the_costs_depend_on(pair: MSDModel) -> None:
    target, draft = pair.target, pair.draft
    assert draft is not None
    keys = [key_of(describe(target, draft, tree)) for tree in (TREE, TreeConfig(2, 2, 8), TreeConfig(3, 3, 8))]
    draft.draft_vocab = torch.arange(20)
    keys.append(key_of(describe(target, draft, TREE)))
    draft.draft_vocab = torch.arange(30)
    keys.append(key_of(describe(target, draft, TREE)))
    target.config.quantization_config = {"load_in_4bit": True}
    keys.append(key_of(describe(target, draft, TREE)))
    assert len(set(keys)) == len(keys)


def test_sizes_without_room_end_the_curve_and_are_not_recorded(
    pair: MSDModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Callable[[int], None]
) -> None:
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    full(4)
    assert pair.draft is not None
    cost = cost_of(pair.target, pair.draft, TREE)
    assert cost.nodes == (1, 2, 3, 4)
    assert not (tmp_path / "cache").exists()


def test_an_adapting_tree_stays_within_memory(
    pair: MSDModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Callable[[int], None]
) -> None:
    """The first request measures, and neither that nor its trees fail."""
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("eagle.decode.msd.cost_of", cost_of)
    inputs = pair.target.prepare(pair.target.chat_prompt("How many?"))
    wanted = pair.generate(**inputs, max_new_tokens=24, temperature=0.0, use_msd=False)
    full(4)
    output = pair.generate(**inputs, max_new_tokens=24, temperature=0.0)
    assert torch.equal(output.sequences, wanted.sequences)
    assert max(output.stats.tree_sizes) <= 4 and output.stats.cut_trees == 0


def test_no_room_for_one_token_is_said(pair: MSDModel, full: Callable[[int], None]) -> None:
    full(0)
    assert pair.draft is not None
    with pytest.raises(UserError, match="out of memory with a single token"):
        measure(pair.target, pair.draft, TREE)


def test_another_failure_is_not_taken_for_it(pair: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Target, "verify", broken)
    assert pair.draft is not None
    with pytest.raises(RuntimeError, match="shape mismatch"):
        measure(pair.target, pair.draft, TREE)


@pytest.mark.parametrize(("budget", "calls"), [(0.0, 3), (1e9, 9)])
def test_what_takes_long_is_measured_fewer_times(
    monkeypatch: pytest.MonkeyPatch, budget: float, calls: int
) -> None:  # fmt: skip
    """Two rounds to warm up, and at least one that counts."""
    monkeypatch.setattr(costs, "BUDGET", budget)
    done: list[str] = []
    times = seconds_of([lambda: done.append("a"), lambda: done.append("b")], rounds=7)
    assert done == ["a", "b"] * calls and len(times) == 2 and min(times) > 0


def test_the_time_of_measuring_is_not_in_the_answers(pair: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the first request starts after it."""
    clock = [0.0]

    def slow(*_: object) -> CostCurve:
        clock[0] = 1e6
        return FLAT

    now = costs.time.perf_counter
    monkeypatch.setattr("eagle.decode.msd.cost_of", slow)
    monkeypatch.setattr("eagle.decode.msd.time.perf_counter", lambda: now() + clock[0])
    inputs = pair.target.prepare(pair.target.chat_prompt("How many?"))
    assert pair.generate(**inputs, max_new_tokens=8, temperature=0.0).stats.seconds < 1e5
    assert clock[0] == 1e6

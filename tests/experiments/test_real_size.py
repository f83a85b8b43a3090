"""Costs at the real size: the formulas by hand, the shapes, and one run of a tiny shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import real_size
from experiments.cost_model import Gpu, Times, bound, break_even, to_depth
from experiments.random_pair import Shape, random_target, tile
from llava.errors import UserError

SEVEN = real_size.SHAPES["7b"][1]


def test_the_formula() -> None:
    assert bound(tau=5.0, one=10.0, draft=5.0, verify=20.0) == 2.0
    assert break_even(one=10.0, draft=5.0, verify=20.0) == 2.5
    assert bound(2.5, 10.0, 5.0, 20.0) == 1.0


def test_a_request_gains_less_than_the_bound() -> None:
    times = Times(one=10.0, draft=5.0, verify=20.0, other=0.0, prompt=100.0, draft_prompt=0.0)
    assert times.request(5.0, new_tokens=11) == pytest.approx((100 + 100) / (100 + 50))
    assert times.request(5.0, new_tokens=100_000) == pytest.approx(times.bound(5.0), rel=1e-2)


def test_a_gpu_reads_or_computes() -> None:
    """One layer of 1 000 parameters, no head: 2 000 bytes read, 2 000 operations a row."""
    gpu = Gpu(bandwidth=1000.0, arithmetic=10_000.0, layer_overhead=0.5)
    assert gpu.seconds(1000, hidden=1, layers=1, rows=1, context=0) == pytest.approx(2.0 + 0.5)
    assert gpu.seconds(1000, hidden=1, layers=1, rows=60, context=0) == pytest.approx(12.0 + 0.5)
    assert gpu.seconds(1000, hidden=1, layers=1, rows=1, context=250) == pytest.approx(3.0 + 0.5)  # keys and values


@pytest.mark.parametrize(("name", "millions"), [("7b", 6738), ("13b", 13_016)])
def test_sizes_are_those_of_the_published_models(name: str, millions: int) -> None:
    """Parameters of Llama 2, the text model."""
    shape = real_size.SHAPES[name][1]
    count = shape.layers * shape.layer_parameters + 2 * shape.head_parameters
    assert count / 1e6 == pytest.approx(millions, rel=1e-3)


def test_layers_are_scaled_by_what_one_takes() -> None:
    assert to_depth(3.0, 5.0, (2, 4), wanted=8) == 9.0
    assert to_depth(3.0, 5.0, (2, 4), wanted=4) == 5.0
    assert to_depth(3.1, 3.0, (2, 4), wanted=8) == 3.1, "noise must not make more layers faster"


def test_layers_fit_the_memory() -> None:
    free = 20 * 10**9
    assert real_size.layers_that_fit(SEVEN, torch.bfloat16, 10**12) == 32
    assert real_size.layers_that_fit(SEVEN, torch.bfloat16, 10**9) == 0
    some = real_size.layers_that_fit(SEVEN, torch.float32, free)
    assert 0 < some < 32
    assert real_size.weight_bytes(replace(SEVEN, layers=some), torch.float32) <= real_size.MEMORY_SHARE * free


def test_random_weights_are_complete() -> None:
    flat = torch.full((25,), float("nan"))
    tile(flat, torch.arange(10.0))
    assert torch.equal(flat, torch.arange(25.0) % 10)
    model = random_target(Shape(32, 2, 2, 48, 128, 64), torch.float32, torch.device("cpu")).model
    state = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, value in state if value.device.type != "cpu" or not value.isfinite().all()] == []
    assert model.model.language_model.rotary_emb.inv_freq[0] == 1.0


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    assert real_size.run(["--quick", "--prompt", "40", "--rounds", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    measured = report["measured"]
    assert measured["nodes"][0] == 1 and measured["nodes"][-1] == 60
    assert len(measured["verify_seconds"]) == len(measured["nodes"])
    assert min(measured["verify_seconds"]) > 0 and measured["load_seconds"] > 0 and measured["peak_memory_bytes"] > 0
    assert set(report["simulated"]) == {"cpu, measured", "GPU, roofline", "GPU, with overheads"}
    printed = capsys.readouterr().out
    assert "tau" in printed and "ChartQA" in printed and "2.29x" in printed


@pytest.mark.parametrize(("name", "published"), [("7b", 2.29), ("13b", 2.46)])
def test_no_machine_was_faster_than_its_bandwidth(tmp_path: Path, name: str, published: float) -> None:
    """The roofline alone must promise more than what was published."""
    out = tmp_path / "report.json"
    assert real_size.run(["--simulate-only", "--model", name, "--out", str(out)]) == 0
    roofline = json.loads(out.read_text())["simulated"]["GPU, roofline"]
    greedy = [row for row in roofline["rows"] if row["temperature"] == 0]
    assert roofline["published_speedup"] == published < max(row["bound"] for row in greedy)
    assert all(row["request"] < row["bound"] for row in roofline["rows"])
    assert roofline["break_even_tau"] < min(row["tau"] for row in greedy)


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(UserError, match="5 of 4 layers"):
        real_size.run(["--quick", "--layers", "5"])

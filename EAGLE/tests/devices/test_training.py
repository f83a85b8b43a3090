"""Training on a GPU mixes no devices: a step, its validation and its checkpoint, on stored states and online."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGPU

from eagle.drafts.checkpoint import load_draft
from eagle.families import Target, load_target
from eagle.ge_data import extract
from eagle.train import collate, main_deepspeed
from eagle.train.engine import PlainEngine
from eagle.train.trainer import Trainer
from llava.errors import run_cli

from ..train.online_support import Case, ViSpecCase
from .conftest import GPU

ONE_STEP = ["--max-steps", "1", "--validate-every", "1", "--validation-limit", "2", "--rollout-steps", "2"]


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    family, *kind = request.param.split()
    made = (ViSpecCase if kind else Case)(family, tmp_path)
    made.allocate()
    return made


def load_on_gpu(*args: Any, device_map: Any, **kwargs: Any) -> Target:
    """`load_target` as far as this machine can: transformers loads onto the CPU."""
    assert device_map == {"": GPU}
    target = load_target(*args, device_map="cpu", **kwargs)
    target.model.to(GPU)
    return target


@pytest.mark.parametrize(
    ("case", "how"), [("llava", "stored"), ("qwen2_vl", "online"), ("qwen2_vl ViSpec", "stored")], indirect=["case"]
)
def test_one_step(case: Case, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Losses and validation are the CPU's; the draft that is saved can be loaded without a GPU."""
    flags, devices = [*getattr(case, how), *ONE_STEP], []
    monkeypatch.setattr(sys, "argv", case.command(f"{how}-cpu", *flags))
    assert run_cli(main_deepspeed.main) == 0
    make = Trainer.__init__

    def watched(self: Trainer, engine: PlainEngine, *rest: Any) -> None:
        devices.extend(parameter.device for parameter in engine.objective.parameters())
        make(self, engine, *rest)

    monkeypatch.setattr(Trainer, "__init__", watched)
    # threads that make batches do not see the pretended GPU, whose driver pinned memory would ask for
    monkeypatch.setattr(collate, "buffer", lambda size, dtype, pin_memory: torch.empty(size, dtype=dtype))
    monkeypatch.setattr(collate.Batch, "pin_memory", lambda batch: batch)
    monkeypatch.setattr(PlainEngine, "choose_device", staticmethod(lambda: GPU))
    monkeypatch.setattr(extract, "load_target", load_on_gpu)
    monkeypatch.setattr(sys, "argv", case.command(f"{how}-gpu", *flags))
    with PretendedGPU():
        assert run_cli(main_deepspeed.main) == 0
    assert set(devices) == {GPU}
    on_cpu, on_gpu = case.history(f"{how}-cpu"), case.history(f"{how}-gpu")
    (expected,), (step,) = on_cpu["steps"], on_gpu["steps"]
    for name in ("loss", "hidden_loss", "token_loss", "top1"):
        assert step[name] == pytest.approx(expected[name], rel=1e-4), name
    assert on_gpu["validations"][0]["results"].keys() == on_cpu["validations"][0]["results"].keys()
    for name, values in on_gpu["validations"][0]["results"].items():
        assert values["loss"] == pytest.approx(on_cpu["validations"][0]["results"][name]["loss"], rel=1e-4)
    drafts = [load_draft(case.folder / f"{how}-{place}" / "best", dtype=torch.float32) for place in ("cpu", "gpu")]
    for one, other in zip(*(draft.parameters() for draft in drafts), strict=True):
        torch.testing.assert_close(one, other, atol=3e-4, rtol=1e-3)  # Adam's first step is the learning rate, 1e-3

"""Weights and losses that are NaN: reported in one line, without looping."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.cli import main
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.msd import DraftModel
from eagle.families.base import Target
from eagle.train import main_deepspeed
from eagle.train.engine import PlainEngine
from llava.errors import UserError, run_cli

NAN = float("nan")


def generate(pair: Path, base: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The error line of `msd generate`."""
    models = ["--base-model", str(base), "--msd-model", str(pair / "draft"), "--dtype", "float32"]
    assert main(["generate", *models, "--prompt", "Name a river.", "--max-new-tokens", "9", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("options", [[], ["--no-msd"], ["--temperature", "1"]], ids=["msd", "plain", "sampled"])
def test_a_base_of_nan(own_pair: Path, capsys: pytest.CaptureFixture[str], name: str, options: list[str]) -> None:
    base = own_pair / "base"
    for shard in base.glob("*.bin"):
        tensors = torch.load(shard, weights_only=True)
        if name in tensors:
            tensors[name].fill_(NAN)
            torch.save(tensors, shard)
    assert "the base model's output is not a number" in generate(own_pair, base, capsys, *options)


def test_nan_in_the_middle_of_an_answer(
    pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    verify = Target.verify

    def overflowing(self, *inputs):
        calls.append(1)
        return verify(self, *inputs) * (NAN if len(calls) == 2 else 1)

    monkeypatch.setattr(Target, "verify", overflowing)
    assert "is not a number" in generate(pair, pair / "base", capsys, "--tree-tokens", "2")
    assert len(calls) == 2


def test_a_draft_that_gives_nan_makes_decoding_slow_and_not_wrong(
    pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every second forward of the draft overflows; trees of each kind, greedy."""
    models = ["--base-model", str(pair / "base"), "--dtype", "float32"]
    request = [*models, "--prompt", "Name a river.", "--max-new-tokens", "24"]
    assert main(["generate", *request, "--no-msd"]) == 0
    expected = capsys.readouterr().out.splitlines()[0]
    forward, calls = DraftModel.forward, []

    def overflowing(self, *inputs, **more):
        calls.append(1)
        return forward(self, *inputs, **more) * (NAN if len(calls) % 2 else 1)

    monkeypatch.setattr(DraftModel, "forward", overflowing)
    for tree in ("auto", "fixed"):
        assert main(["generate", *request, "--msd-model", str(pair / "draft"), "--tree", tree]) == 0
        assert capsys.readouterr().out.splitlines()[0] == expected
    assert len(calls) > 4


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_draft_of_nan_is_named(own_pair: Path, value: float) -> None:
    draft = own_pair / "draft"
    tensors = load_file(draft / "model.safetensors")
    tensors["fc.bias"][3] = value
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(UserError, match=r"infinite values in fc\.bias: .*model\.safetensors"):
        load_draft(draft)


def test_training_stops_at_a_loss_of_nan_and_keeps_what_was_good(
    training: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Saved after each step, logged after each fourth: the bad step is found before it is saved."""
    step, done = PlainEngine.step, []

    def spoilt(self, batches, learning_rate):
        done.append(1)
        return step(self, batches, learning_rate) * (NAN if len(done) == 3 else 1)

    monkeypatch.setattr(PlainEngine, "step", spoilt)
    monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *training(save_every=1, log_every=4, keep_last=1)])
    assert run_cli(main_deepspeed.main) == 2
    assert "the loss is not a number, at step 3" in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "ck").glob("step-*")] == ["step-00000002"]
    load_draft(tmp_path / "ck" / "step-00000002")


def test_a_stop_at_max_steps_does_not_save_weights_that_are_not_numbers(
    training: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss of the last step is good, its gradient is not."""
    step, done = PlainEngine.step, []

    def spoilt(self, batches, learning_rate):
        done.append(1)
        metrics = step(self, batches, learning_rate)
        if len(done) == 3:
            with torch.no_grad():
                self.objective.draft.fc.weight[0, 0] = NAN
        return metrics

    monkeypatch.setattr(PlainEngine, "step", spoilt)
    arguments = training(save_every=2, log_every=10, max_steps=3)
    monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *arguments])
    assert run_cli(main_deepspeed.main) == 2
    assert "weights that are not numbers, at step 3" in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "ck").glob("step-*")] == ["step-00000002"]


def test_a_run_is_not_resumed_from_weights_that_are_not_numbers(
    training: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such a checkpoint was written before stops were guarded."""
    with monkeypatch.context() as patch:
        patch.setattr("eagle.train.trainer.Trainer._check_weights", lambda self: None)
        step = PlainEngine.step

        def spoilt(self, batches, learning_rate):
            metrics = step(self, batches, learning_rate)
            with torch.no_grad():
                self.objective.draft.fc.weight[0, 0] = NAN
            return metrics

        patch.setattr(PlainEngine, "step", spoilt)
        patch.setattr("sys.argv", ["main_deepspeed.py", *training(save_every=1, log_every=10, max_steps=1)])
        assert run_cli(main_deepspeed.main) == 0
    monkeypatch.setattr(
        "sys.argv", ["main_deepspeed.py", *training(save_every=1, log_every=10, max_steps=3), "--resume"]
    )
    assert run_cli(main_deepspeed.main) == 2
    assert "not numbers" in capsys.readouterr().err or "NaN" in capsys.readouterr().err

"""Damaged files are refused in one line, or read as they are if the damage cannot be detected. Never a traceback."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_support import MakesFolder, damaged

from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.hidden_states.index import load_index
from eagle.train import main_deepspeed
from eagle.train.engine import PlainEngine
from llava.errors import UserError, run_cli


def check(load: Callable[[], Any], file: Path, count: int, at_least: int, seed: int = 0) -> None:
    """Loads ``count`` damaged copies of ``file``; at least ``at_least`` of them are refused, all others are read."""
    whole, refused = file.read_bytes(), 0
    for data in damaged(whole, count, seed):
        file.write_bytes(data)
        try:
            load()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    file.write_bytes(whole)
    load()
    assert refused >= at_least


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_draft(own_pair: Path, name: str) -> None:
    draft = own_pair / "draft"
    check(lambda: load_draft(draft), draft / name, count=60, at_least=20)


def check_base(folder: Path, count: int) -> None:
    base = folder / "base"
    for file in sorted(path for path in base.iterdir() if path.suffix in {".json", ".bin", ".model"}):
        check(lambda: load_target(base, dtype="float32"), file, count, at_least=count // 6, seed=len(file.name))


def test_a_damaged_base(own_pair: Path) -> None:
    check_base(own_pair, 6)


@pytest.mark.slow
def test_a_base_damaged_in_many_ways(own_pair: Path) -> None:
    check_base(own_pair, 90)


def test_a_damaged_index_of_a_corpus(training: Callable[..., list[str]], tmp_path: Path) -> None:
    training()
    check(lambda: load_index(tmp_path / "text"), tmp_path / "text" / "index.json", count=60, at_least=15)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], int]:
    def call(argv: Sequence[str]) -> int:
        monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *argv])
        return run_cli(main_deepspeed.main)

    return call


def test_a_damaged_checkpoint_of_a_training(
    training: Callable[..., list[str]], run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names it; without it the run resumes from the one before."""
    assert run(training(save_every=2, max_steps=4)) == 0
    newest = tmp_path / "ck" / "step-00000004"
    capsys.readouterr()
    for name in ("state/engine.pt", "state/random-000.pt", "progress.json"):
        file = newest / name
        whole = file.read_bytes()
        for data in (whole[: len(whole) // 2], b"", b"[]", b"\x80\x04]."):
            file.write_bytes(data)
            assert run(training("--resume", save_every=2)) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error:") and "step-00000004" in line
        file.write_bytes(whole)
    os.truncate(newest / "state" / "engine.pt", 100)
    shutil.rmtree(newest)
    assert run(training("--resume", save_every=2)) == 0
    assert "resumed after step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), torch.distributed.DistError("peer"), OSError(errno.EIO, "disk")],
)
def test_a_failing_device_is_not_a_damaged_checkpoint(
    training: Callable[..., list[str]], run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The user must not be told to remove a good checkpoint."""
    assert run(training(save_every=2, max_steps=2)) == 0

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PlainEngine, "load", fail)
    monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *training("--resume", save_every=2)])
    with pytest.raises(type(error)):
        main_deepspeed.main()


def test_no_pickle_of_a_checkpoint_runs_code(
    training: Callable[..., list[str]], run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(training(save_every=2, max_steps=2)) == 0
    state = tmp_path / "ck" / "step-00000002" / "state"
    for name in ("engine.pt", "random-000.pt"):
        whole = (state / name).read_bytes()
        for save in (
            lambda value, file: torch.save(value, file),
            lambda value, file: file.write_bytes(pickle.dumps(value)),
        ):
            save({"cpu": MakesFolder(tmp_path / "ran"), "objective": MakesFolder(tmp_path / "ran")}, state / name)
            assert run(training("--resume", save_every=2)) == 2
            assert "checkpoint is damaged" in capsys.readouterr().err
            assert not (tmp_path / "ran").exists()
        (state / name).write_bytes(whole)


def test_no_pickle_of_a_base_or_draft_runs_code(own_pair: Path, tmp_path: Path) -> None:
    base, draft = own_pair / "base", own_pair / "draft"
    (draft / "model.safetensors").unlink()
    shard = next(base.glob("pytorch_model*.bin"))
    for load, file in ((lambda: load_target(base), shard), (lambda: load_draft(draft), draft / "pytorch_model.bin")):
        torch.save({"fc.weight": MakesFolder(tmp_path / "ran")}, file)
        with pytest.raises(UserError):
            load()
        file.write_bytes(pickle.dumps({"fc.weight": MakesFolder(tmp_path / "ran")}))
        with pytest.raises(UserError):
            load()
        assert not (tmp_path / "ran").exists()


def test_json_made_to_do_harm(own_pair: Path) -> None:
    draft = own_pair / "draft"
    config = json.loads((draft / "config.json").read_text())
    deep, long = "[" * 200_000, '{"hidden_size": ' + "9" * 10_000 + "}"
    huge = json.dumps({**config, "hidden_size": 10**12, "intermediate_size": 10**12})
    for text in (deep, long, huge, json.dumps({**config, "num_attention_heads": 0}), "null", "3"):
        (draft / "config.json").write_text(text)
        with pytest.raises(UserError):
            load_draft(draft)

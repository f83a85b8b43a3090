"""A full disk: one line, the old file as it was, no partial file, and the run resumes when there is room."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from fault_support import text_rows

from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.ge_data import allocation, convert
from eagle.hidden_states.shards import ShardDataset
from eagle.train import main_deepspeed
from llava.errors import UserError, run_cli
from llava.files import atomic_write

Limit = Callable[[int], AbstractContextManager[None]]


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def write_text(file: Path) -> None:
    file.write_text("x" * 100_000)


def write_torch(file: Path) -> None:
    torch.save(torch.zeros(100_000), file)


@pytest.mark.parametrize("write", [write_text, write_torch])
def test_the_old_file_stays(full_at: Limit, tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with (
        full_at(50_000),
        pytest.raises(UserError, match=r"no room left to write this file.*file"),
        atomic_write(path) as new,
    ):
        write(new)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [write_text, write_torch])
def test_the_old_file_stays_on_a_real_full_disk(small_disk: Path, write: Callable[[Path], None]) -> None:
    path = small_disk / "file"
    path.write_text("old")
    with pytest.raises(UserError, match=r"no room left to write this file.*file"), atomic_write(path) as new:
        write(new)
    assert path.read_text() == "old" and [p.name for p in small_disk.iterdir()] == ["file"]


def test_a_draft(pair: Path, small_disk: Path, full_at: Limit, tmp_path: Path) -> None:
    """safetensors has its own writer."""
    draft = load_draft(pair / "draft")
    with full_at(4096), pytest.raises(UserError, match="no room left"):
        save_draft(draft, tmp_path / "draft")
    assert list((tmp_path / "draft").iterdir()) == []
    (small_disk / "filler").write_bytes(b"x" * 50_000)
    with pytest.raises(UserError, match="no room left"):
        save_draft(draft, small_disk / "draft", dtype=torch.float32)
    assert list((small_disk / "draft").iterdir()) == []


def test_conversion(full_at: Limit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = tmp_path / "rows.json", tmp_path / "out.json"
    rows.write_text(json.dumps(text_rows(300)))
    command = ["--input", str(rows), "--output", str(out)]
    with full_at(20_000):
        assert run_cli(lambda: convert.main(command)) == 2
    assert "no room left to write this file" in line_of(capsys) and not out.exists()
    assert run_cli(lambda: convert.main(command)) == 0 and len(json.loads(out.read_text())) == 300


def test_hidden_states(full_at: Limit, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards that were finished stay; with room, the rest is made."""
    rows, out = tmp_path / "rows.json", tmp_path / "out"
    rows.write_text(json.dumps(text_rows(5) + text_rows(4, length=60)))
    command = ["--outdir", str(out), "--model_type", "llava_v15_t", "--model", str(pair / "base"), "--gpus", "cpu",
               "--image_data_path", str(tmp_path), "--json_data_path", str(rows), "--shard-size", "1"]  # fmt: skip
    with full_at(16_000):
        assert run_cli(lambda: allocation.main(command)) == 2
    assert "no room left to write this file" in line_of(capsys)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("rows-*")}
    assert len(kept) < 9 and not list(out.glob(".*.tmp*"))
    assert run_cli(lambda: allocation.main(command)) == 0
    assert len(ShardDataset(out)) == 9
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_training(
    full_at: Limit, training: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The disk fills up between two checkpoints: the first stays, and the run resumes from it."""
    monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *training(save_every=2, max_steps=2)])
    assert run_cli(main_deepspeed.main) == 0
    monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *training("--resume", save_every=2)])
    with full_at(10_000):
        assert run_cli(main_deepspeed.main) == 2
    assert "error: no room left" in capsys.readouterr().err  # after the progress bar
    assert [folder.name for folder in (tmp_path / "ck").glob("step-*")] == ["step-00000002"]
    assert run_cli(main_deepspeed.main) == 0
    assert "resumed after step 2" in capsys.readouterr().out and (tmp_path / "ck" / "final").is_dir()


def test_an_error_outside_of_a_file_of_ours_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        with open("/dev/full", "w") as device:
            device.write("x")
        return 0

    assert run_cli(fails) == 2
    assert "no room left to write" in line_of(capsys)

"""The check for GPU owners runs on a CPU with the pocket pairs, and a part that fails does not hide the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_check_run
from llava.errors import run_cli


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--quick", "--device", "cpu", "--out", str(out), *flags])
    return run_cli(gpu_check.main)


@pytest.mark.slow
def test_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, tmp_path) == 0, capsys.readouterr().err[-2000:]
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    names = [part["name"] for part in report["parts"]]
    assert any("identity" in name for name in names) and "training" in names and "batches" in names
    for part in report["parts"]:
        judged = part["verdicts"] or part["name"].endswith("costs")  # of which nothing is expected on a CPU
        assert part["error"] is None and part["figures"] and judged, part["name"]
        if "identity" in part["name"]:
            assert part["figures"]["differ"] == 0  # float32
        if part["name"].endswith("compiled parts"):
            assert {what: holds for what, holds, _ in part["verdicts"]}["no compilation after warm-up"]
            assert all(row["functions compiled"] == 0 for row in part["figures"]["after the warm-up"])
    speed = next(part for part in report["parts"] if part["name"].endswith("speed"))
    assert {row["way"] for row in speed["figures"]["ways"]} >= {"MSD", "autoregressive", "generate, dynamic cache"}
    assert "<script" not in (tmp_path / "gpu_check.html").read_text()


def test_a_part_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plan(arguments: object, device: torch.device) -> object:
        yield "first", lambda part: part.expect("a", True, "b")
        yield "second", lambda part: [][0]
        yield "third", lambda part: part.expect("c", False, "<d>")

    monkeypatch.setattr(gpu_check_run, "plan", plan)
    assert run(monkeypatch, tmp_path) == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [part["error"] for part in parts] == [None, "IndexError: list index out of range", None]
    page = (tmp_path / "gpu_check.html").read_text()
    assert "NOT as expected: c: &lt;d&gt;" in page and "failed: IndexError" in page


def test_operations_and_waits_are_counted() -> None:
    with gpu_check_run.Operations() as seen:
        value = torch.ones(3) + 1
        value.sum().item()
    assert seen.counts["waits"] == 1 and seen.counts["operations"] >= 3

"""The draft's benchmarks run as their command lines say and write what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import draft_head, visual_context
from llava import UserError

SMALL = ["--hidden", "32", "--intermediate", "64", "--heads", "4", "--kv-heads", "2", "--vocabulary", "200"]


def test_visual_context_records_every_size_and_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "context.json"
    sizes = ["--image-tokens", "8", "300", "--keep", "0", "16", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["visual_context", *SMALL, *sizes])
    visual_context.main()
    report = json.loads(out.read_text())
    assert [(record["image_tokens"], record["asked"], record["kept"]) for record in report["records"]] == [
        (8, "all", 8), (8, 0, 0), (8, 16, 8), (300, "all", 300), (300, 0, 0), (300, 16, 16)]  # fmt: skip
    assert all(record["prefill_ms"] > 0 and record["cycle_ms"] > 0 for record in report["records"])
    assert report["settings"]["keep"] == [0, 16] and report["hardware"] and report["versions"]["torch"]


def test_draft_head_compares_both_heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "head.json"
    monkeypatch.setattr(sys, "argv", ["draft_head", *SMALL, "--keep", "50", "--rounds", "1", "--out", str(out)])
    draft_head.main()
    report = json.loads(out.read_text())
    assert report["speedup"] == pytest.approx(report["whole_seconds"] / report["trimmed_seconds"])
    assert report["settings"]["keep"] == 50 and report["hardware"] and report["versions"]["torch"]


def test_draft_head_keeps_no_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draft_head", *SMALL, "--keep", "500"])
    with pytest.raises(UserError, match="--keep 500 of a vocabulary of 200"):
        draft_head.main()

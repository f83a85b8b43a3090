"""The record of how something was made."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
import torch

from eagle import __version__, provenance


def test_the_record_names_date_commit_command_versions_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/msd", "bench", "--limit", "3"])
    made = json.loads(json.dumps(provenance.record(torch.device("cpu"))))
    assert set(made) == {"date", "commit", "command", "versions", "hardware"}
    assert datetime.fromisoformat(made["date"]).tzinfo is not None
    assert made["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", made["commit"])
    assert made["command"] == ["msd", "bench", "--limit", "3"]  # without the folder of the program
    assert made["versions"]["torch"] == torch.__version__.split("+")[0]
    assert made["versions"].get("msd-eagle", __version__) == __version__
    assert made["hardware"]["threads"] == torch.get_num_threads() and made["hardware"]["cpu"]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"step": 40, "total_steps": 690}, "trained for 40 of 690 steps"),
        ({"step": 690, "total_steps": 690}, None),
        ({"step": 40}, None),  # of an older release
    ],
)
def test_a_draft_that_is_partly_trained(tmp_path: Path, made: dict[str, int], told: str | None) -> None:
    assert provenance.partly_trained(tmp_path) is None
    (tmp_path / "provenance.json").write_text(json.dumps(made))
    assert provenance.partly_trained(tmp_path) == told


def test_packages_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert set(provenance.versions()) == {"python", "torch"}

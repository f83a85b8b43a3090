"""Where results are kept between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle.cache import cache_folder


def test_the_first_folder_that_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MSD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("costs") == tmp_path / "home" / ".cache" / "msd" / "costs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder("costs") == tmp_path / "user" / "msd" / "costs"
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "own"))
    assert cache_folder("costs") == tmp_path / "own" / "costs"


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MSD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder("costs").parent.parent == tmp_path

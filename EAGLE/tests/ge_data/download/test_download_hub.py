"""Annotation files from the hub: fetched once, and what cannot be had is named."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from file_server import FileServer
from hub_server import HubServer
from huggingface_hub import hf_hub_download

from eagle.ge_data.download import __main__ as download
from llava.errors import run_cli

from .test_download import ROWS, tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "image_data"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer) -> Iterator[HubServer]:
    """A hub that has one of the two annotation files."""
    folder = tmp_path / "hub" / "anon8231489123" / "ShareGPT_Vicuna_unfiltered"
    folder.mkdir(parents=True)
    (folder / "ShareGPT_V3_unfiltered_cleaned_split.json").write_bytes(ROWS)
    (tmp_path / "hub" / "liuhaotian" / "LLaVA-Instruct-150K").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer(tmp_path / "hub") as running:
        monkeypatch.setattr(download, "hf_hub_download", partial(hf_hub_download, endpoint=running.address))
        yield running


def test_annotations_from_the_hub(hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--root", str(root), "--only", "annotations"]
    assert run_cli(lambda: download.main(command)) == 2
    shown = capsys.readouterr()
    assert "error: llava: the hub does not have llava_v1_5_mix665k.json" in shown.err
    assert shown.err.splitlines()[-1].startswith("error: 1 of 2 sets failed: llava")
    assert tree(root) == ["annotations/ShareGPT_V3_unfiltered_cleaned_split.json"]
    assert (root / tree(root)[0]).read_bytes() == ROWS
    asked = len(hub.requests)
    assert run_cli(lambda: download.main([*command[:-1], "sharegpt"])) == 0
    assert len(hub.requests) == asked, "a file that is there is not asked for"


def test_hub_that_cannot_be_reached(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_cli(lambda: download.main(["--root", str(root), "--only", "sharegpt"])) == 2
    first, last = capsys.readouterr().err.splitlines()
    expected = "error: sharegpt: download of ShareGPT_V3_unfiltered_cleaned_split.json from the hub failed ("
    assert first.startswith(expected) and last.startswith("error: 1 of 1 sets failed: sharegpt")
    assert hub.requests == []

"""A tiny base model, pictures, annotation files and a file server for the tests of data generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from file_server import FileServer
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian, make_llava_hf

from eagle.families import Target, load_target
from eagle.ge_data import allocation
from eagle.ge_data.download import transfer
from eagle.hidden_states.index import load_index, read_header
from llava.errors import run_cli

Write = Callable[[list[Any]], Path]
TOKENS = 8
"""Of the longest answer that a target makes itself."""


def turns(*texts: str) -> list[dict[str, str]]:
    """Turns of human and gpt in alternation."""
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def text_record(number: int, length: int = 1) -> dict[str, Any]:
    """A record of two questions; ``length`` makes it longer."""
    answer = "The Nile is longer than the Rhine. " * length
    return {"id": f"text{number}", "conversations": turns("Name two rivers.", answer, "And?", f"That is {number}.")}


def image_record(number: int, picture: str = "a.png") -> dict[str, Any]:
    """A record with a picture."""
    said = turns("<image>\nWhat colours?", f"Red and {number}.", "More?", "No, only red.")
    return {"id": number, "image": picture, "conversations": said}


@pytest.fixture(scope="session", params=["liuhaotian", "llava_hf"])
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA in each public layout."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return (make_liuhaotian if request.param == "liuhaotian" else make_llava_hf)(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA."""
    return make_liuhaotian(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def target(base: Path) -> Target:
    return load_target(base, dtype="float32")


@pytest.fixture(scope="session")
def any_target(any_base: Path) -> Target:
    return load_target(any_base, dtype="float32")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pictures of different shape and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    make_image(folder / "a.png", seed=1)
    make_image(folder / "b.png", width=30, height=60, seed=2)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


@pytest.fixture
def annotations(tmp_path: Path) -> Write:
    """Writes records as an annotation file."""

    def write(records: list[Any]) -> Path:
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        return path

    return write


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A loopback server, which no proxy of the environment stands before."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer() as running:
        yield running


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, in seconds, none of which is waited."""
    asked: list[float] = []
    monkeypatch.setattr(transfer, "sleep", asked.append)
    return asked


def command(base: Path, data: Path, outdir: Path, kind: str = "t", *more: str, pictures: Path = Path()) -> list[str]:
    """Arguments of the allocation, on this process's CPU."""
    fixed = ["--outdir", str(outdir), "--model_type", f"llava_v15_{kind}", "--model", str(base), "--gpus", "cpu"]
    return [*fixed, "--image_data_path", str(pictures), "--json_data_path", str(data), "--shard-size", "3", *more]


def allocate(*args: Any, **kwargs: Any) -> int:
    return run_cli(lambda: allocation.main(command(*args, **kwargs)))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of each shard, by name."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("rows-*")}


def rows_of(folder: Path) -> tuple[list[int], list[int]]:
    """Numbers in the annotation file of the samples and of the skipped records, in shard order."""
    headers = [read_header(folder / shard.file) for shard in load_index(folder).shards]
    return tuple([one.row for header in headers for one in getattr(header, kind)] for kind in ("samples", "skipped"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Target:
    base = make_liuhaotian(tmp_path_factory.mktemp("one") / "base")
    loaded = load_target(base, dtype="float32")
    loaded.folder = base  # type: ignore[attr-defined]
    loaded.draft = make_draft(base.parent / "draft", loaded, seed=1, agree=1.0)  # type: ignore[attr-defined]
    return loaded


def regenerate(target: Any, data: Path, out: Path, kind: str = "t", *more: str, pictures: Path = Path()) -> int:
    """The command with --regenerate on this process's CPU."""
    family = {"llava": "llava_v15"}.get(target.family, target.family)
    flags = ["--outdir", str(out), "--model_type", f"{family}_{kind}", "--model", str(target.folder), "--gpus", "cpu"]
    flags += ["--image_data_path", str(pictures), "--json_data_path", str(data), "--shard-size", "3"]
    flags += ["--dtype", "float32", "--regenerate", "--max-new-tokens", str(TOKENS), *more]
    return run_cli(lambda: allocation.main(flags))

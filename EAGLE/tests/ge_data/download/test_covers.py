"""Covers of OCR-VQA: always JPEG, several at a time; the gone ones are listed, the failed ones reported."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from file_server import FileServer
from PIL import Image

from eagle.ge_data.download import covers as module
from eagle.ge_data.download.covers import as_jpeg, fetch_covers, missing_covers, read_addresses
from eagle.ge_data.download.inventory import gone_covers
from eagle.ge_data.download.transfer import Refused
from llava.errors import UserError

PAGE = b"<html>log in</html>"


def picture(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), colour: object = "red") -> bytes:
    buffer = BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ocr_vqa" / "images"


@pytest.mark.parametrize(
    ("kind", "mode", "colour", "expected"),
    [
        ("PNG", "RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("PNG", "RGBA", (0, 0, 255, 255), (0, 0, 255)),
        ("PNG", "L", 0, (0, 0, 0)),
        ("GIF", "P", 0, None),
        ("TIFF", "CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("WEBP", "RGB", "red", (255, 0, 0)),
    ],
)
def test_other_formats_become_jpeg(kind: str, mode: str, colour: object, expected: tuple[int, int, int] | None) -> None:
    with Image.open(BytesIO(as_jpeg(picture(kind, mode, colour=colour), "address"))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 30))
        if expected is not None:
            assert np.abs(np.asarray(image).astype(int) - expected).max() <= 3


def test_jpeg_stays_and_what_is_not_a_picture_is_refused() -> None:
    assert as_jpeg(picture(), "address") == picture()
    for data in (b"", PAGE, picture()[:-200], picture("PNG")[:40]):
        with pytest.raises(Refused, match=r"picture.*: address"):
            as_jpeg(data, "address")
    with pytest.raises(Refused, match="placeholder"):  # the placeholder of a shop
        as_jpeg(picture("GIF", "P", (1, 1), 0), "address")


def test_gone_covers_are_listed_and_nothing_is_asked_twice(
    server: FileServer, folder: Path, waits: list[float]
) -> None:
    files = {name: server.put(name, picture()) for name in ("a", "b", "c")}
    files["b"].statuses, files["c"].statuses = [404] * 9, [503]
    addresses = {name: server.url(name) for name in files}
    fetch_covers(addresses, folder, workers=2)
    assert sorted(os.listdir(folder)) == ["a.jpg", "c.jpg"]
    listed = f"b\t{server.url('b')}\tthe server says 404 Not Found\n"
    assert (folder.parent / "gone.txt").read_text() == listed

    (folder / "a.jpg").unlink()
    fetch_covers(addresses, folder, workers=2)
    assert (folder / "a.jpg").exists() and len(files["b"].requests) == 1
    elsewhere = {**addresses, "b": server.url("mirror")}
    assert list(missing_covers(elsewhere, folder)) == ["b"], "another address may have it"


def test_failed_covers_are_named_and_the_others_fetched(server: FileServer, folder: Path, waits: list[float]) -> None:
    server.put("a", picture(), statuses=[500] * 99)
    server.put("b", picture())
    with pytest.raises(UserError) as caught:
        fetch_covers({name: server.url(name) for name in "ab"}, folder, workers=1)
    assert str(caught.value).startswith("1 of 2 covers failed, the first a: download failed")
    assert os.listdir(folder) == ["b.jpg"] and not (folder.parent / "gone.txt").exists()
    server.put("a", picture())
    fetch_covers({name: server.url(name) for name in "ab"}, folder, workers=1)
    assert sorted(os.listdir(folder)) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("how", [{"content": PAGE}, {"content": picture(), "statuses": [403] * 99}, None])
def test_refused_covers_are_gone_if_as_many_arrive(
    server: FileServer, folder: Path, how: dict[str, object] | None
) -> None:
    """Otherwise every later download would fail because of them. None: an address that is not one."""
    server.put("good", picture())
    if how is not None:
        server.put("bad", **how)  # type: ignore[arg-type]
    addresses = {"good": server.url("good"), "bad": "//shop/1.jpg" if how is None else server.url("bad")}
    fetch_covers(addresses, folder, workers=1)
    asked = {name: len(file.requests) for name, file in server.files.items()}
    fetch_covers(addresses, folder, workers=1)
    assert {name: len(file.requests) for name, file in server.files.items()} == asked
    (line,) = (folder.parent / "gone.txt").read_text().splitlines()
    assert line.split("\t")[:2] == ["bad", addresses["bad"]] and len(line.split("\t")) == 3


def test_a_page_for_everything_makes_no_cover_gone(
    server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = {name: server.url(name) for name in "abc"}
    for name in addresses:
        server.put(name, PAGE)
    with pytest.raises(UserError, match="3 covers failed and no other can be downloaded, a: the server did not send"):
        fetch_covers(addresses, folder, workers=1)
    assert not (folder.parent / "gone.txt").exists()
    monkeypatch.setattr(module, "BATCH", 2)
    with pytest.raises(UserError, match="2 covers failed and no other"):
        fetch_covers(addresses, folder, workers=1)


def test_refused_covers_are_gone_if_saved_ones_still_arrive(
    server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other cover is left to download, so saved ones are requested again: is it the network?"""
    monkeypatch.setattr(module, "BATCH", 4)
    good = {f"g{n}": server.url(f"g{n}") for n in range(12)}
    bad = {f"b{n}": server.url(f"b{n}") for n in range(10)}
    for name in good:
        server.put(name, picture())
    for name in bad:
        server.put(name, b"", statuses=[403] * 99)
    fetch_covers(good, folder, workers=2)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for name in good:
        server.put(name, PAGE)
    with pytest.raises(UserError, match="4 covers failed and no other"):
        fetch_covers(good | bad, folder, workers=1)
    assert not (folder.parent / "gone.txt").exists()
    for name in good:
        server.put(name, picture())
    fetch_covers(good | bad, folder, workers=1)
    assert set(gone_covers(folder)) == set(bad)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


BAD_LISTS = {
    "<html>quota exceeded</html>": "not valid JSON",
    "[]": "not a JSON object",
    '{"a": {"title": "A"}}': "no imageURL for 'a'",
    '{"a": "http://x/a.jpg"}': "no imageURL for 'a'",
    '{"../a": {"imageURL": "http://x/a.jpg"}}': "'../a', which is not a file name",
    '{"a/b": {"imageURL": "http://x/a.jpg"}}': "'a/b', which is not a file name",
}


@pytest.mark.parametrize("text", BAD_LISTS)
def test_bad_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=BAD_LISTS[text]):
        read_addresses(tmp_path / "dataset.json")

"""Covers of OCR-VQA: JPEG whatever came, several at a time, the gone ones listed, the failed ones named."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from file_server import FileServer
from PIL import Image

from eagle.ge_data.download import covers as module
from eagle.ge_data.download.covers import as_cover, fetch_covers, missing_covers, read_addresses, save_cover
from eagle.ge_data.download.fetch import Gone, Refused
from llava.errors import UserError


def picture(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), colour: object = "red") -> bytes:
    buffer = BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ocr_vqa" / "images"


def test_jpeg_is_saved_as_it_came(tmp_path: Path) -> None:
    save_cover(as_cover(picture(), "address"), tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == picture() and os.listdir(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize(
    ("kind", "mode", "colour", "expected"),
    [
        ("PNG", "RGB", "red", (255, 0, 0)),
        ("PNG", "RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("PNG", "RGBA", (0, 0, 255, 255), (0, 0, 255)),
        ("PNG", "L", 0, (0, 0, 0)),
        ("GIF", "P", 0, None),
        ("TIFF", "CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("WEBP", "RGB", "red", (255, 0, 0)),
    ],
)
def test_other_formats_become_jpeg(
    tmp_path: Path, kind: str, mode: str, colour: object, expected: tuple[int, int, int] | None
) -> None:
    save_cover(as_cover(picture(kind, mode, colour=colour), "address"), tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 30))
        if expected is not None:
            assert np.abs(np.asarray(image).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("data", [b"", b"<html>no such book</html>", picture()[:-200], picture("PNG")[:40]])
def test_what_is_no_whole_picture_is_refused(data: bytes) -> None:
    with pytest.raises(Refused, match=r"picture.*: address"):
        as_cover(data, "address")


def test_placeholder_of_one_pixel_is_a_cover_that_is_gone() -> None:
    with pytest.raises(Gone):
        as_cover(picture("GIF", "P", (1, 1), 0), "address")


def test_gone_covers_are_listed_and_nothing_is_asked_twice(
    server: FileServer, folder: Path, waits: list[float]
) -> None:
    files = {name: server.put(name, picture()) for name in ("a", "b", "c")}
    files["b"].statuses, files["c"].statuses = [404] * 9, [503]
    addresses = {name: server.url(name) for name in files}
    assert fetch_covers(addresses, folder, workers=2) == (2, 1)
    assert sorted(os.listdir(folder)) == ["a.jpg", "c.jpg"]
    said = f"b\t{server.url('b')}\tthe server has no such file (404 Not Found)\n"
    assert (folder.parent / "gone.txt").read_text() == said
    assert {name: len(file.requests) for name, file in files.items()} == {"a": 1, "b": 1, "c": 2}

    (folder / "a.jpg").unlink()
    assert fetch_covers(addresses, folder, workers=2) == (2, 1)
    assert {name: len(file.requests) for name, file in files.items()} == {"a": 2, "b": 1, "c": 2}

    server.put("mirror", picture())
    elsewhere = {**addresses, "b": server.url("mirror")}
    assert list(missing_covers(elsewhere, folder)) == ["b"], "another address may have it"


def test_no_gone_list_without_gone_covers(server: FileServer, folder: Path) -> None:
    server.put("a", picture())
    fetch_covers({"a": server.url("a")}, folder, workers=1)
    assert os.listdir(folder.parent) == ["images"]


def test_failed_covers_are_named_and_the_others_fetched(server: FileServer, folder: Path, waits: list[float]) -> None:
    server.put("a", picture(), statuses=[500] * 99)
    server.put("b", picture())
    server.put("c", picture(), statuses=[429] * 99)
    with pytest.raises(UserError) as caught:
        fetch_covers({name: server.url(name) for name in "abc"}, folder, workers=1)
    assert str(caught.value).startswith("2 of 3 covers failed, the first a: download failed")
    assert os.listdir(folder) == ["b.jpg"] and not (folder.parent / "gone.txt").exists()
    server.put("a", picture())
    server.put("c", picture())
    assert fetch_covers({name: server.url(name) for name in "abc"}, folder, workers=1) == (3, 0)


REFUSALS: dict[str, dict[str, object]] = {
    "no picture": {"content": b"<html>sold out</html>"},
    "403": {"content": picture(), "statuses": [403] * 99},
    "451": {"content": picture(), "statuses": [451] * 99},
    "half a picture": {"content": picture()[:-300]},
    "packed": {"content": picture(), "headers": {"Content-Encoding": "gzip"}},
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refused_covers_are_gone_where_as_many_come(server: FileServer, folder: Path, kind: str) -> None:
    """Else every later download would end with their failure."""
    names = {"good": {"content": picture()}, "bad": REFUSALS[kind]}
    for name, how in names.items():
        server.put(name, **how)  # type: ignore[arg-type]
    addresses = {name: server.url(name) for name in names}
    assert fetch_covers(addresses, folder, workers=1) == (1, 1)
    assert fetch_covers(addresses, folder, workers=1) == (1, 1) and len(server.files["bad"].requests) == 1
    (line,) = (folder.parent / "gone.txt").read_text().splitlines()
    assert line.split("\t")[:2] == ["bad", server.url("bad")] and len(line.split("\t")) == 3


def test_an_address_that_is_none_is_gone(server: FileServer, folder: Path) -> None:
    server.put("good", picture())
    addresses = {"good": server.url("good"), "bad": "//shop/1.jpg"}
    assert fetch_covers(addresses, folder, workers=1) == (1, 1) and missing_covers(addresses, folder) == {}


def test_a_page_for_everything_makes_no_cover_gone(server: FileServer, folder: Path) -> None:
    addresses = {name: server.url(name) for name in "abc"}
    for name in addresses:
        server.put(name, b"<html>log in</html>")
    server.put("a", picture())
    with pytest.raises(UserError, match="2 of 3 covers failed, the first b: what the server sent is no picture"):
        fetch_covers(addresses, folder, workers=1)
    assert not (folder.parent / "gone.txt").exists() and len(server.files["a"].requests) == 1


def test_the_refused_of_earlier_runs_are_gone_in_the_end(
    server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is left to come, so covers that are there are asked for again: whose fault is it?"""
    monkeypatch.setattr(module, "HOPELESS", 4)
    good = {f"g{n}": server.url(f"g{n}") for n in range(12)}
    bad = {f"b{n}": server.url(f"b{n}") for n in range(10)}
    for name in good:
        server.put(name, picture())
    for name in bad:
        server.put(name, b"", statuses=[403] * 99)
    assert fetch_covers(good, folder, workers=2) == (12, 0)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for name in good:
        server.put(name, b"<html>log in</html>")
    with pytest.raises(UserError, match="the last 4 covers all failed"):
        fetch_covers(good | bad, folder, workers=1)
    assert not (folder.parent / "gone.txt").exists()
    for name in good:
        server.put(name, picture())
    assert fetch_covers(good | bad, folder, workers=1) == (12, 10)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_list_of_an_earlier_release_is_read(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder.parent / "gone.txt").write_text("a\thttp://x/a.jpg\n")
    assert missing_covers({"a": "http://x/a.jpg", "b": "http://x/b.jpg"}, folder) == {"b": "http://x/b.jpg"}


def test_covers_come_several_at_a_time(server: FileServer, folder: Path) -> None:
    barrier = Barrier(3)
    for name in "abc":
        server.put(name, picture(), barrier=barrier)
    assert fetch_covers({name: server.url(name) for name in "abc"}, folder, workers=3) == (3, 0)


def test_a_dead_network_ends_the_set(
    server: FileServer, folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOPELESS", 3)
    addresses = {f"n{n}": server.url(f"n{n}") for n in range(50)}
    for name in addresses:
        server.put(name, b"login page")
    with pytest.raises(UserError, match="the last 3 covers all failed"):
        fetch_covers(addresses, folder, workers=1)
    asked = sum(len(file.requests) for file in server.files.values())
    assert 3 <= asked < 50, "the rest was asked for all the same"


def test_gone_covers_do_not_count_as_a_dead_network(
    server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOPELESS", 2)
    assert fetch_covers({f"n{n}": server.url(f"n{n}") for n in range(5)}, folder, workers=1) == (0, 5)


BAD_LISTS = {
    "<html>quota exceeded</html>": "not valid JSON",
    "[]": "not the list",
    "{}": "not the list",
    '{"a": {"title": "A"}}': "no imageURL for 'a'",
    '{"a": "http://x/a.jpg"}': "no imageURL for 'a'",
    '{"../a": {"imageURL": "http://x/a.jpg"}}': "no file name, '../a'",
    '{"a/b": {"imageURL": "http://x/a.jpg"}}': "no file name, 'a/b'",
}


@pytest.mark.parametrize("text", BAD_LISTS)
def test_bad_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=BAD_LISTS[text]) as caught:
        read_addresses(tmp_path / "dataset.json")
    assert "--ocr-vqa-list" in str(caught.value)


def test_list(tmp_path: Path) -> None:
    entries = {"0153.X": {"imageURL": "http://x/1.jpg", "title": "One"}, "B00-2": {"imageURL": "http://x/2.gif"}}
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    assert read_addresses(tmp_path / "dataset.json") == {"0153.X": "http://x/1.jpg", "B00-2": "http://x/2.gif"}

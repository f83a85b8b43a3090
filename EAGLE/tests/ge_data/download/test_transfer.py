"""Downloads from a server that drops, forgets, changes and refuses: complete or not there, nothing sent twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from file_server import ETAG, File, FileServer

from eagle.ge_data.download import transfer as module
from eagle.ge_data.download.__main__ import check_md5
from eagle.ge_data.download.transfer import Refused, fetch, fetch_bytes
from llava.errors import UserError

DATA = bytes(range(251)) * 400
OTHER = bytes(reversed(DATA))
MODIFIED = "Mon, 06 Jul 2020 10:00:00 GMT"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.zip"


@pytest.fixture
def broken_off(server: FileServer, target: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Ends a first call after 30 000 bytes, as a kill would; returns the file of the server."""

    def begin(**how: object) -> File:
        file = server.put("file.zip", DATA, drop_after=[30_000], **how)
        with monkeypatch.context() as patch, pytest.raises(UserError):
            patch.setattr(module, "TRIES", 1)
            fetch(server.url("file.zip"), target, "file")
        assert not target.exists() and (target.parent / "file.zip.part").stat().st_size == 30_000
        waits.clear()
        return file

    return begin


def check_complete(target: Path, content: bytes = DATA) -> None:
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target], "a temporary file is left"


@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
def test_complete_file(server: FileServer, target: Path, length: bool) -> None:
    file = server.put("file.zip", DATA, length=length)
    fetch(server.url("file.zip"), target, "file")
    check_complete(target)
    assert len(file.requests) == 1


def test_a_dropped_connection_is_resumed(server: FileServer, target: Path, waits: list[float]) -> None:
    file = server.put("file.zip", DATA, drop_after=[1, 40_000, 0])
    fetch(server.url("file.zip"), target, "file")
    check_complete(target)
    assert [request.range for request in file.requests] == [None, "bytes=1-", "bytes=40001-", "bytes=40001-"]
    assert {request.if_range for request in file.requests[1:]} == {ETAG}
    assert file.sent == len(DATA), "bytes were sent twice"


@pytest.mark.parametrize("longest", [None, 25_000], ids=["whole rest", "short partial answers"])
def test_the_next_call_resumes(
    server: FileServer, target: Path, broken_off: Callable, waits: list[float], longest: int | None
) -> None:
    file = broken_off(longest=longest)
    fetch(server.url("file.zip"), target, "file")
    check_complete(target)
    assert file.sent == len(DATA) and bool(waits) == bool(longest)


@pytest.mark.parametrize(
    ("how", "if_range", "sent"),
    [
        ({"etag": None}, None, len(DATA)),
        ({"etag": 'W/"weak"'}, None, len(DATA)),
        ({"etag": 'W/"weak"', "modified": MODIFIED}, MODIFIED, len(DATA) - 30_000),
        ({"ranges": False}, ETAG, len(DATA)),
    ],
)
def test_only_a_known_version_is_resumed(
    server: FileServer, target: Path, broken_off: Callable, how: dict, if_range: str | None, sent: int
) -> None:
    file = broken_off(**how)
    fetch(server.url("file.zip"), target, "file")
    check_complete(target)
    assert (file.requests[-1].if_range, file.requests[-1].sent) == (if_range, sent)


@pytest.mark.parametrize("if_range", [True, False], ids=["If-Range", "only Range"])
def test_a_changed_file_is_never_mixed(
    server: FileServer, target: Path, broken_off: Callable, if_range: bool, waits: list[float]
) -> None:
    file = broken_off(if_range=if_range)
    file.content, file.etag = OTHER, '"two"'
    fetch(server.url("file.zip"), target, "file")
    check_complete(target, OTHER)
    assert file.requests[-1].status == 200


@pytest.mark.parametrize(("there", "statuses"), [(DATA, []), (DATA + b"more", [416, 200])], ids=["all", "too much"])
def test_a_kill_after_the_last_byte(
    server: FileServer, target: Path, there: bytes, statuses: list[int], waits: list[float]
) -> None:
    file = server.put("file.zip", DATA)
    target.parent.mkdir()
    (target.parent / "file.zip.part").write_bytes(there)
    (target.parent / "file.zip.part.json").write_text(json.dumps({"version": ETAG, "size": len(DATA)}))
    fetch(server.url("file.zip"), target, "file")
    check_complete(target)
    assert [request.status for request in file.requests] == statuses


def test_failures_are_retried_and_end_in_one_line(server: FileServer, target: Path, waits: list[float]) -> None:
    server.put("file.zip", DATA, statuses=[500, 503, 429])
    fetch(server.url("file.zip"), target, "file")
    check_complete(target)
    assert all(0.75 * 2**n <= wait <= 1.25 * 2**n for n, wait in enumerate(waits)) and len(waits) == 3
    waits.clear()
    file = server.put("file.zip", DATA, statuses=[500] * 100)
    with pytest.raises(UserError) as caught:
        fetch(server.url("file.zip"), target, "file")
    assert len(file.requests) == module.TRIES == len(waits) + 1
    line = str(caught.value)
    assert "500" in line and server.url("file.zip") in line and "run the command again" in line and "\n" not in line
    with pytest.raises(UserError, match="refused"):
        fetch("http://127.0.0.1:1/file.zip", target, "file")


def test_only_new_bytes_are_progress(
    server: FileServer, target: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = server.put("file.zip", DATA, ranges=False, drop_after=[1000] * 100)
    with pytest.raises(UserError, match=f"the connection ended after 1000 of {len(DATA)} bytes"):
        fetch(server.url("file.zip"), target, "file")
    assert len(file.requests) == module.TRIES
    waits.clear()
    monkeypatch.setattr(module, "TRIES", 2)
    server.put("file.zip", DATA, drop_after=[1000] * 20)
    fetch(server.url("file.zip"), target, "file")
    check_complete(target)
    assert len(waits) == 20 and max(waits) <= 1.25


@pytest.mark.parametrize("status", [404, 410, 403])
def test_final_answers_are_not_retried(server: FileServer, target: Path, waits: list[float], status: int) -> None:
    file = server.put("file.zip", DATA, statuses=[status])
    with pytest.raises(Refused, match=str(status)):
        fetch(server.url("file.zip"), target, "file")
    assert len(file.requests) == 1 and not waits and not target.exists()


def test_a_wrong_file_is_discarded(server: FileServer, target: Path) -> None:
    file = server.put("file.zip", DATA)
    with pytest.raises(UserError, match=r"wrong file, discarded: checksum.*--mirror"):
        fetch(server.url("file.zip"), target, "file", partial(check_md5, expected=hashlib.md5(OTHER).hexdigest()))
    assert list(target.parent.iterdir()) == []
    fetch(server.url("file.zip"), target, "file", partial(check_md5, expected=hashlib.md5(DATA).hexdigest()))
    check_complete(target)
    assert len(file.requests) == 2


@pytest.mark.parametrize(("factor", "needed"), [(1, len(DATA) - 30_000), (2, 2 * len(DATA) - 30_000)])
def test_the_space_is_checked_before_data_is_written(
    target: Path, server: FileServer, broken_off: Callable, monkeypatch: pytest.MonkeyPatch, factor: int, needed: int
) -> None:
    broken_off()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match="not enough space for file"):
        fetch(server.url("file.zip"), target, "file", space_factor=factor)
    assert (target.parent / "file.zip.part").stat().st_size == 30_000, "what was there is kept"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    fetch(server.url("file.zip"), target, "file", space_factor=factor)
    check_complete(target)


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/a", "a.zip", "http://[::bad/"])
def test_only_web_addresses(tmp_path: Path, address: str) -> None:
    with pytest.raises(Refused, match="not an"):
        fetch(address, tmp_path / "file", "file")
    assert not (tmp_path / "file").exists()


def test_a_small_file(server: FileServer, waits: list[float]) -> None:
    file = server.put("a%20b.jpg", DATA, drop_after=[10])
    assert fetch_bytes(server.url("a b.jpg"), len(DATA)) == DATA
    assert len(file.requests) == 2
    with pytest.raises(Refused, match="more than 1000 bytes"):
        fetch_bytes(server.url("a b.jpg"), 1000)

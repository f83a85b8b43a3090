"""Transfers from a server that drops, forgets, changes and refuses: whole or not there, and nothing sent twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from file_server import ETAG, File, FileServer

from eagle.ge_data.download import fetch as module
from eagle.ge_data.download.fetch import Gone, Passing, Refused, fetch, fetch_bytes, retried
from llava.errors import UserError

DATA = bytes(range(251)) * 400
OTHER = bytes(reversed(DATA))
MODIFIED = "Mon, 06 Jul 2020 10:00:00 GMT"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.zip"


@pytest.fixture
def broken_off(server: FileServer, target: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Has a first call end after 30 000 bytes, as a kill would; gives the file as the server has it."""

    def begin(**how: object) -> File:
        file = server.put("file.zip", DATA, drop_after=[30_000], **how)
        with monkeypatch.context() as patch, pytest.raises(UserError):
            patch.setattr(module, "TRIES", 1)
            fetch(server.url("file.zip"), target, "file")
        assert not target.exists() and (target.parent / "file.zip.part").stat().st_size == 30_000
        waits.clear()
        return file

    return begin


def check_whole(target: Path, content: bytes = DATA) -> None:
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target], "something of the transfer is left"


@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
def test_whole_file(server: FileServer, target: Path, length: bool) -> None:
    file = server.put("file.zip", DATA, length=length)
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert len(file.requests) == 1


def test_dropped_connection_goes_on_where_it_broke(server: FileServer, target: Path, waits: list[float]) -> None:
    file = server.put("file.zip", DATA, drop_after=[1, 40_000, 0])
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert [request.range for request in file.requests] == [None, "bytes=1-", "bytes=40001-", "bytes=40001-"]
    assert {request.if_range for request in file.requests[1:]} == {ETAG}
    assert file.sent == len(DATA), "bytes were sent twice"


def test_next_call_goes_on(server: FileServer, target: Path, broken_off: Callable, waits: list[float]) -> None:
    file = broken_off()
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert [request.sent for request in file.requests] == [30_000, len(DATA) - 30_000] and not waits


def test_short_partial_answers_are_put_together(server: FileServer, target: Path, broken_off: Callable) -> None:
    file = broken_off(longest=25_000)
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert file.sent == len(DATA)


def test_server_without_ranges_starts_anew(server: FileServer, target: Path, broken_off: Callable) -> None:
    file = broken_off(ranges=False)
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert [(request.status, request.sent) for request in file.requests] == [(200, 30_000), (200, len(DATA))]


@pytest.mark.parametrize("if_range", [True, False], ids=["If-Range", "only Range"])
def test_changed_file_is_never_mixed(server: FileServer, target: Path, broken_off: Callable, if_range: bool) -> None:
    file = broken_off(if_range=if_range)
    file.content, file.etag = OTHER, '"two"'
    fetch(server.url("file.zip"), target, "file")
    check_whole(target, OTHER)
    assert file.requests[-1].status == 200


@pytest.mark.parametrize(
    ("etag", "modified", "asked"),
    [(None, None, None), ('W/"weak"', None, None), (None, MODIFIED, MODIFIED), ('W/"weak"', MODIFIED, MODIFIED)],
)
def test_resumes_only_what_can_be_told_apart(
    server: FileServer, target: Path, broken_off: Callable, etag: str | None, modified: str | None, asked: str | None
) -> None:
    file = broken_off(etag=etag, modified=modified)
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert file.requests[-1].if_range == asked
    assert file.requests[-1].range == ("bytes=30000-" if asked else None)


@pytest.mark.parametrize("there", [DATA, DATA + b"more"], ids=["all", "too much"])
def test_nothing_left_to_send(server: FileServer, target: Path, there: bytes, waits: list[float]) -> None:
    file = server.put("file.zip", DATA)
    target.parent.mkdir()
    (target.parent / "file.zip.part").write_bytes(there)
    (target.parent / "file.zip.part.json").write_text(json.dumps({"ETag": ETAG}))
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert [request.status for request in file.requests] == ([416] if there == DATA else [416, 200])


def test_passing_failures_are_tried_again(server: FileServer, target: Path, waits: list[float]) -> None:
    file = server.put("file.zip", DATA, statuses=[500, 503, 429])
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert len(file.requests) == 4
    assert all(0.75 * 2**n <= wait <= 1.25 * 2**n for n, wait in enumerate(waits)) and len(waits) == 3


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("100000", module.LONGEST_PAUSE)])
def test_server_says_how_long_to_wait(
    server: FileServer, target: Path, waits: list[float], asked: str, waited: float
) -> None:
    server.put("file.zip", DATA, statuses=[503], headers={"Retry-After": asked})
    fetch(server.url("file.zip"), target, "file")
    assert waits == [waited]


def test_gives_up_in_one_line(server: FileServer, target: Path, waits: list[float]) -> None:
    file = server.put("file.zip", DATA, statuses=[500] * 100)
    with pytest.raises(UserError) as caught:
        fetch(server.url("file.zip"), target, "file")
    assert len(file.requests) == module.TRIES == len(waits) + 1
    line = str(caught.value)
    assert "500" in line and server.url("file.zip") in line and "run the command again" in line and "\n" not in line


def test_server_that_is_not_there(tmp_path: Path, waits: list[float]) -> None:
    with pytest.raises(UserError, match="refused"):
        fetch("http://127.0.0.1:1/file.zip", tmp_path / "file.zip", "file")
    assert len(waits) == module.TRIES - 1


def test_tries_count_anew_after_progress(
    server: FileServer, target: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIES", 2)
    server.put("file.zip", DATA, drop_after=[1000] * 20)
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert len(waits) == 20 and max(waits) <= 1.25


def test_same_bytes_again_are_no_progress(server: FileServer, target: Path, waits: list[float]) -> None:
    file = server.put("file.zip", DATA, ranges=False, drop_after=[1000] * 100)
    with pytest.raises(UserError, match=f"the connection ended after 1000 of {len(DATA)} bytes"):
        fetch(server.url("file.zip"), target, "file")
    assert len(file.requests) == module.TRIES


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "run the command again: what is done is kept"),
        ({"etags": [f'"{n % 2}"' for n in range(99)]}, "it begins anew, for the server lets no download go on"),
        ({"etags": [f'"{n % 2}"' for n in range(99)], "if_range": False}, "run the command again)"),
        ({"ranges": False}, "it begins anew, for the server lets no download go on"),
        ({"etag": None}, "it begins anew, for the server lets no download go on"),
        ({"statuses": [503] * 99}, "run the command again)"),
    ],
)
def test_what_is_said_of_the_next_run_is_true(
    server: FileServer, target: Path, waits: list[float], how: dict[str, object], said: str
) -> None:
    drops = [1000, *[0] * 99] if not how else [1000] * 99
    file = server.put("file.zip", DATA, drop_after=drops, **how)
    with pytest.raises(UserError, match="download failed") as caught:
        fetch(server.url("file.zip"), target, "file")
    assert said in str(caught.value)
    asked, file.statuses, file.drop_after = len(file.requests), [], []
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)
    assert sum(r.sent for r in file.requests[asked:]) == len(DATA) - (1000 if not how else 0)


@pytest.mark.parametrize(("status", "kind"), [(404, Gone), (410, Gone), (403, Refused), (407, UserError)])
def test_final_answers_are_final(
    server: FileServer, target: Path, waits: list[float], status: int, kind: type[UserError]
) -> None:
    file = server.put("file.zip", DATA, statuses=[status])
    with pytest.raises(UserError, match=str(status)) as caught:
        fetch(server.url("file.zip"), target, "file")
    assert type(caught.value) is kind and len(file.requests) == 1 and not waits and not target.exists()


def test_checksum(server: FileServer, target: Path) -> None:
    file = server.put("file.zip", DATA)
    with pytest.raises(UserError, match="checksum"):
        fetch(server.url("file.zip"), target, "file", md5=hashlib.md5(OTHER).hexdigest())
    assert list(target.parent.iterdir()) == []
    fetch(server.url("file.zip"), target, "file", md5=hashlib.md5(DATA).hexdigest())
    check_whole(target)
    assert len(file.requests) == 2


def test_check_sees_the_size_before_a_byte_is_written(server: FileServer, target: Path, broken_off: Callable) -> None:
    broken_off()
    seen = []

    def refuse(total: int | None, have: int) -> None:
        seen.append((total, have))
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        fetch(server.url("file.zip"), target, "file", refuse)
    assert seen == [(len(DATA), 30_000)]
    assert (target.parent / "file.zip.part").stat().st_size == 30_000, "what was there is kept"


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/a", "a.zip", "http://[::bad/"])
def test_only_web_addresses(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match="not an"):
        fetch(address, tmp_path / "file", "file")
    assert not (tmp_path / "file").exists()


def test_small_file(server: FileServer, waits: list[float]) -> None:
    file = server.put("a b.jpg", DATA, drop_after=[10])
    server.files["a%20b.jpg"] = file
    assert fetch_bytes(server.url("a b.jpg"), len(DATA)) == DATA
    assert len(file.requests) == 2
    with pytest.raises(UserError, match="more than 1000 bytes"):
        fetch_bytes(server.url("a b.jpg"), 1000)


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP"])
def test_a_packed_body_is_refused(server: FileServer, target: Path, encoding: str) -> None:
    """Its bytes are not the file's."""
    server.put("file.zip", DATA, headers={"Content-Encoding": encoding})
    with pytest.raises(Refused, match=rf"packs what it sends \({encoding.lower()}\)"):
        fetch(server.url("file.zip"), target, "file")
    assert not target.exists()
    server.put("file.zip", DATA, headers={"Content-Encoding": "Identity"})
    fetch(server.url("file.zip"), target, "file")
    check_whole(target)


def test_a_defect_is_not_retried(waits: list[float]) -> None:
    def work() -> None:
        raise KeyError("defect")

    with pytest.raises(KeyError):
        retried(work, "here")
    assert not waits


def test_waits_have_a_longest(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIES", 12)

    def work() -> None:
        raise Passing("busy")

    with pytest.raises(UserError, match=r"failed 12 times \(busy\): here"):
        retried(work, "here")
    assert len(waits) == 11 and waits[-1] == module.LONGEST_PAUSE == max(waits)

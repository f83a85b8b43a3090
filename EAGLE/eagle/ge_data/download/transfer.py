"""Downloads over http: retried with back-off, resumed after a break, complete and valid or not there.

An unfinished download is ``NAME.part`` with ``NAME.part.json``: the version of the file as the server names it (ETag or
Last-Modified) and its size. It is resumed only while the server still has that version.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from time import sleep
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from eagle.ge_data.download.sources import WEB
from eagle.ge_data.progress import format_bytes, progress_bar
from llava.errors import UserError, is_full_disk
from llava.files import read_object, write_json

TRIES = 7
"""Failures in a row without new data before a download is given up; pauses of 1 to 32 seconds are between them."""
TIMEOUT = 60.0
"""Seconds without data after which a connection counts as broken."""
CHUNK = 1 << 16
RANGE_REFUSED = 416
RETRYABLE = (408, RANGE_REFUSED, 425, 429)
AGAIN = "run the command again"
MIRROR = "--mirror takes another address"

T = TypeVar("T")


class Refused(UserError):
    """This file cannot be downloaded from this address; a retry would not help."""


def fetch(
    address: str, path: Path, label: str, verify: Callable[[Path], object] = lambda path: None, space_factor: int = 1
) -> None:
    """Downloads a file. After a failure or a kill, the next call resumes.

    Args:
        label: name on the progress bar and in messages.
        verify: raises `UserError` for a wrong file, which is then discarded.
        space_factor: disk space that is needed for each byte of the file; 2 if it will be unpacked.

    Raises:
        UserError: the file is refused or wrong, the retries are used up, or there is not enough space.
        OSError: the disk is full or fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with progress_bar(label, "B") as bar:
        _retry(lambda: _download_rest(address, part, label, space_factor, bar), address, lambda: _size(part))
    try:
        verify(part)
    except UserError as error:
        _discard(part)
        raise UserError(f"the server sent a wrong file, discarded: {error.what}", address, MIRROR) from None
    os.replace(part, path)
    _discard(part)


def fetch_bytes(address: str, limit: int) -> bytes:
    """Downloads a small file into memory.

    Raises:
        UserError: see `fetch`; also if the file has more than ``limit`` bytes.
    """

    def attempt() -> bytes:
        with _request(address) as response:
            size, data = response.length, response.read(limit + 1)
        if len(data) > limit:
            raise Refused(f"file of more than {limit} bytes", address)
        _check_complete(len(data), size)
        return data

    return _retry(attempt, address)


def need_space(folder: Path, size: int, what: str) -> None:
    """Raises `UserError` if the disk of ``folder``, which need not exist, has less than ``size`` bytes free."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        message = f"not enough space for {what}: {format_bytes(size)} needed, {format_bytes(free)} free"
        raise UserError(message, folder, "free some space, or give another --root")


def _retry(work: Callable[[], T], address: str, progress: Callable[[], int] = lambda: 0) -> T:
    """Calls ``work`` until it returns, with growing pauses after a failure that may not happen again.

    Raises:
        UserError: the server refuses, or ``work`` failed `TRIES` times in a row without new ``progress``.
        OSError: the disk is full or fails.
    """
    failures, best = 0, progress()
    while True:
        try:
            return work()
        except HTTPError as error:
            error.close()
            reason = f"the server says {error.code} {error.reason}"
            if error.code < 500 and error.code not in RETRYABLE:
                raise Refused(reason, address, MIRROR) from None
        except (InvalidURL, ValueError) as error:
            raise Refused(f"not an address ({error})", address) from None
        except (OSError, HTTPException) as error:
            if is_full_disk(error) or getattr(error, "filename", None):
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        have = progress()
        failures, best = (1, have) if have > best else (failures + 1, best)
        if failures == TRIES:
            raise UserError(f"download failed {TRIES} times ({reason})", address, AGAIN)
        sleep(2 ** (failures - 1) * random.uniform(0.75, 1.25))


def _download_rest(address: str, part: Path, label: str, space_factor: int, bar: Any) -> None:
    """One request: for the whole file, or for the rest of it."""
    have, state_file = _size(part), _state_file(part)
    state = read_object(state_file, "state of a download") if have and state_file.exists() else {}
    version, size = state.get("version"), state.get("size")
    if have and have == size:
        return
    try:
        response = _request(address, {"Range": f"bytes={have}-", "If-Range": version} if have and version else {})
    except HTTPError as error:
        if error.code == RANGE_REFUSED:  # the server's file is shorter than what is here
            _discard(part)
        raise
    with response:
        if response.status == 206:
            given = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if given is None or int(given[1]) != have or _version(response) not in (None, version):
                _discard(part)
                raise ConnectionError("the file changed on the server")  # which does not know If-Range
            size = int(given[2])
        else:
            _discard(part)
            have, size = 0, response.length
        need_space(part.parent, space_factor * (size or 0) - have, label)
        if not have:
            write_json(state_file, {"version": _version(response), "size": size})
        bar.total, bar.n, bar.initial = size, have, have
        with part.open("ab") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    _check_complete(_size(part), size)


def _request(address: str, headers: Mapping[str, str] | None = None) -> HTTPResponse:
    """Sends a GET request. Follows redirects and uses the proxies of the environment."""
    if not address.startswith(WEB):
        raise Refused("not an http or https address", address)
    headers = {"User-Agent": "msd-download", "Accept-Encoding": "identity", **(headers or {})}
    request = Request(quote(address, safe="%/:=&?~#+!$,;'@()*[]"), headers=headers)
    response: HTTPResponse = urlopen(request, timeout=TIMEOUT)
    return response


def _check_complete(have: int, size: int | None) -> None:
    if size is not None and have < size:
        raise ConnectionError(f"the connection ended after {have} of {size} bytes")


def _version(response: HTTPResponse) -> str | None:
    """What ``If-Range`` takes: a strong ETag, else the date of change."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_file(part).unlink(missing_ok=True)

"""Downloads over http: retried with back-off, resumed after a break, complete or not there.

An unfinished download is ``NAME.part`` with ``NAME.part.json``: the version of the file as the server names it (ETag or
Last-Modified) and its size. It is resumed only while the server still has that version.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from time import sleep
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from eagle.ge_data.progress import progress_bar
from llava.errors import UserError
from llava.files import read_json, write_json

TRIES = 6
"""Failures in a row without new data before a download is given up."""
PAUSE = 1.0
"""Seconds to wait after the first failure; doubled after each further one."""
LONGEST_PAUSE = 60.0
TIMEOUT = 60.0
"""Seconds without data after which a connection counts as broken."""
CHUNK = 1 << 20
GONE = (404, 410)
RETRYABLE = (408, 416, 425, 429)
AGAIN = "run the command again"
MIRROR = "--mirror takes another address"

T = TypeVar("T")


class RetryableError(Exception):
    """A failure that may not happen again. ``status``: of the answer, if there was one; ``wait``: seconds that the
    server asks to wait."""

    def __init__(self, reason: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.wait = status, wait


class Gone(UserError):
    """The server does not have this file."""


class Refused(UserError):
    """This file cannot be had from this address; a retry would not help."""


def fetch(
    address: str,
    path: Path,
    label: str,
    check: Callable[[int | None, int], None] = lambda size, have: None,
    md5: str | None = None,
) -> None:
    """Downloads a file. After a failure or a kill, the next call resumes.

    Args:
        label: name on the progress bar.
        check: called before data is written, with the size of the file (None if the server does not say) and the
            number of bytes that are here already; may raise.
        md5: the expected checksum.

    Raises:
        UserError: the file is gone or refused, the retries are used up, or the checksum differs.
        OSError: the disk is full or fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with progress_bar(label, "B") as bar:
        retry(lambda: _attempt(address, part, check, bar), address, lambda: _size(part))
    if md5 is not None and (found := _md5(part, label)) != md5:
        _discard(part)
        raise UserError(f"checksum (MD5) is {found}, not {md5}", address, f"the file was discarded; {AGAIN}")
    os.replace(part, path)
    _discard(part)


def fetch_bytes(address: str, limit: int) -> bytes:
    """Downloads a small file into memory.

    Raises:
        UserError: see `fetch`; also if the file has more than ``limit`` bytes.
    """

    def attempt() -> bytes:
        with open_address(address) as response:
            size, data = _total(response), b""
            while (size is None or len(data) < size) and (chunk := _read(response)):
                data += chunk
                if len(data) > limit:
                    raise Refused(f"file of more than {limit} bytes", address)
            _check_complete(len(data), size)
            return data

    return retry(attempt, address)


def retry(work: Callable[[], T], address: str, progress: Callable[[], int] = lambda: 0) -> T:
    """Calls ``work`` until it returns, with growing pauses after a `RetryableError`.

    Args:
        address: for the message.
        progress: bytes that are done; when they grow beyond their maximum, failures are counted from 0 again.

    Raises:
        UserError: `TRIES` failures in a row.
    """
    failures, best = 0, progress()
    while True:
        try:
            return work()
        except RetryableError as error:
            if progress() > best:
                failures, best = 0, progress()
            failures += 1
            if failures == TRIES:
                raise UserError(f"download failed {TRIES} times ({error})", address, AGAIN) from None
            pause = PAUSE * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
            sleep(min(LONGEST_PAUSE, pause if error.wait is None else error.wait))


def open_address(address: str, headers: Mapping[str, str] | None = None) -> HTTPResponse:
    """Sends a GET request. Follows redirects and uses the proxies of the environment.

    Raises:
        Gone, Refused: a retry would not help.
        RetryableError: it might.
    """
    if not address.startswith(("http://", "https://")):
        raise Refused("not an http or https address", address)
    headers = {"User-Agent": "msd-download", "Accept-Encoding": "identity", **(headers or {})}
    try:
        request = Request(quote(address, safe="%/:=&?~#+!$,;'@()*[]"), headers=headers)
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            raise _error_of_status(error, address) from None
    except (InvalidURL, ValueError) as error:
        raise Refused(f"not an address ({error})", address) from None
    except (OSError, HTTPException) as error:
        raise RetryableError(_reason(error)) from None
    return response


def _attempt(address: str, part: Path, check: Callable[[int | None, int], None], bar: Any) -> None:
    """One request: for the whole file, or for the rest of it."""
    state = _state(part)
    version, size, have = state.get("version"), state.get("size"), _size(part)
    if have and have == size:
        return
    headers = {"Range": f"bytes={have}-", "If-Range": str(version)} if have and version else {}
    try:
        with open_address(address, headers) as response:
            if response.status == 206:
                first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                if first is None or int(first[1]) != have or _version(response) not in (None, version):
                    _discard(part)  # the server does not know If-Range
                    raise RetryableError("the file changed on the server, starting over")
            else:
                _discard(part)
            _receive(response, part, check, bar)
    except RetryableError as error:
        if error.status == 416:  # the server's file is shorter than what is here
            _discard(part)
        raise


def _receive(response: HTTPResponse, part: Path, check: Callable[[int | None, int], None], bar: Any) -> None:
    have, size = _size(part), _total(response)
    check(size, have)
    if not have:
        write_json(_state_file(part), {"version": _version(response), "size": size})
    bar.total, bar.n, bar.initial = size, have, have
    with part.open("ab") as file:
        while (size is None or have < size) and (chunk := _read(response)):
            file.write(chunk)
            have += len(chunk)
            bar.update(len(chunk))
    _check_complete(have, size)


def _version(response: HTTPResponse) -> str | None:
    """What ``If-Range`` takes: a strong ETag, else the date of change."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _total(response: HTTPResponse) -> int | None:
    """Size of the whole file, if the server says it."""
    if response.status == 206:
        total = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
        return int(total[1]) if total else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _read(response: HTTPResponse) -> bytes:
    """Data that has arrived; b"" at the end."""
    try:
        return response.read1(CHUNK)
    except (OSError, HTTPException) as error:
        raise RetryableError(_reason(error)) from None


def _check_complete(have: int, size: int | None) -> None:
    if size is not None and have < size:
        raise RetryableError(f"the connection ended after {have} of {size} bytes")


def _error_of_status(error: HTTPError, address: str) -> Exception:
    status = f"{error.code} {error.reason}".strip()
    if error.code in GONE:
        return Gone(f"the server has no such file ({status})", address, MIRROR)
    if error.code in RETRYABLE or error.code >= 500:
        wait = error.headers.get("Retry-After", "")
        return RetryableError(f"the server says {status}", error.code, float(wait) if wait.isdecimal() else None)
    return Refused(f"the server refuses ({status})", address, MIRROR)


def _reason(error: OSError | HTTPException) -> str:
    inner = error.reason if isinstance(error, URLError) else error
    text = inner.strerror if isinstance(inner, OSError) and inner.strerror else str(inner)
    return text or type(inner).__name__


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _state(part: Path) -> dict[str, Any]:
    """Version and size of the file that ``part`` belongs to; {} without one."""
    path = _state_file(part)
    return dict(read_json(path, "state of a download")) if part.exists() and path.exists() else {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_file(part).unlink(missing_ok=True)


def _md5(path: Path, label: str) -> str:
    with path.open("rb") as file, progress_bar(f"{label}, checksum", "B", path.stat().st_size) as bar:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()

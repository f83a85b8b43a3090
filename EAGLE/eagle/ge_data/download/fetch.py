"""Transfers over http that survive: retried with back-off, resumed where they broke, whole or not there.

A transfer under way is two files beside its target: ``NAME.part``, the bytes so far, and ``NAME.part.json``, what
the server calls this version of the file. With the second the server is asked to go on only if it still has that
version.
"""

from __future__ import annotations

import hashlib
import json
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

from eagle.progress_bars import progress_bar
from llava.errors import UserError
from llava.files import atomic_write, read_json

TRIES = 6
"""Tries in a row that bring nothing new before a transfer is given up."""
PAUSE = 1.0
"""Seconds to wait after the first of them; each further wait is twice as long."""
LONGEST_PAUSE = 60.0
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
CHUNK = 1 << 20
AGENT = "msd-download"
AGAIN = "run the command again"
PLAIN = "identity"
"""What HTTP calls a body that is not packed for the way."""
GONE = (404, 410)
PROXY_ASKS = 407
PASSING = (408, 425, 429)

T = TypeVar("T")


class Passing(Exception):
    """A failure that another try may mend; ``wait``: seconds the server asks to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Gone(UserError):
    """The server does not have the file (any more)."""


class Refused(UserError):
    """The server, or the address itself, says no to this one file; another try would not help."""


class _OutOfRange(Passing):
    """There is nothing behind the bytes we have; ``total``: bytes of the file, if the server tells."""

    def __init__(self, total: int | None) -> None:
        super().__init__("the server has fewer bytes than are here already")
        self.total = total


def fetch(
    address: str,
    path: Path,
    label: str,
    check: Callable[[int | None, int], None] = lambda total, have: None,
    md5: str | None = None,
) -> None:
    """Downloads a file; after a failure or a kill the next call goes on where this one was.

    Args:
        label: name on the progress bar.
        check: called with the file's size (None if the server does not tell) and the bytes that are here, before
            more are written; may raise.
        md5: what the file's checksum has to be.

    Raises:
        UserError: no such file, the server refuses, the tries are used up, or the checksum is another one.
        OSError: the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(label, "B") as bar:
        transfer = _Transfer(address, path, check, bar)
        retried(transfer.attempt, address, transfer.have, transfer.fix)
    if md5 is not None and (found := _md5(transfer.part, label)) != md5:
        transfer.forget()
        raise UserError(
            f"checksum (MD5) is {found}, not {md5}", address, "the download was discarded: run the command again"
        )
    os.replace(transfer.part, path)
    transfer.forget()


def fetch_bytes(address: str, limit: int) -> bytes:
    """A small file.

    Raises:
        UserError: as `fetch`, or the file has more than ``limit`` bytes.
    """

    def attempt() -> bytes:
        with open_address(address) as response:
            total, data = _total(response), b""
            while (total is None or len(data) < total) and (chunk := _read(response)):
                data += chunk
                if len(data) > limit:
                    raise Refused(f"file of more than {limit} bytes", address)
            if total is not None and len(data) < total:
                raise Passing(f"the connection ended after {len(data)} of {total} bytes")
            return data

    return retried(attempt, address)


def retried(
    work: Callable[[], T], where: str, progress: Callable[[], int] = lambda: 0, fix: Callable[[], str] = lambda: AGAIN
) -> T:
    """Calls ``work`` until it returns; waits longer and longer after a `Passing` failure.

    Args:
        where: what is worked on, for the message.
        progress: grows with what is done; tries count anew when it is more than ever before.
        fix: what the user can do after the last try.

    Raises:
        UserError: `TRIES` failures in a row.
    """
    failures, best = 0, progress()
    while True:
        try:
            return work()
        except Passing as failure:
            if progress() > best:
                failures, best = 0, progress()
            failures += 1
            if failures == TRIES:
                raise UserError(f"download failed {TRIES} times ({failure})", where, fix()) from None
            pause = PAUSE * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
            sleep(min(LONGEST_PAUSE, pause if failure.wait is None else failure.wait))


def open_address(address: str, headers: Mapping[str, str] | None = None) -> HTTPResponse:
    """Asks for an address, redirects followed; proxies are those of the environment.

    Raises:
        Gone, Refused, UserError: another try would not help.
        Passing: it might.
    """
    if not address.startswith(("http://", "https://")):
        raise Refused("not an http or https address", address)
    quoted = quote(address, safe="%/:=&?~#+!$,;'@()*[]")
    try:
        request = Request(quoted, headers={"User-Agent": AGENT, "Accept-Encoding": PLAIN, **(headers or {})})
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            raise _judged(error, address) from None
    except (InvalidURL, ValueError) as error:
        raise Refused(f"not an address ({error})", address) from None
    except (OSError, HTTPException) as error:
        raise Passing(_reason(error)) from None
    if (packed := response.headers.get("Content-Encoding", PLAIN).strip().lower()) != PLAIN:
        response.close()
        raise Refused(f"the server packs what it sends ({packed}), unasked", address, "--mirror takes another address")
    return response


class _Transfer:
    """A file on its way; ``part`` and ``version`` are its two files."""

    def __init__(self, address: str, path: Path, check: Callable[[int | None, int], None], bar: Any) -> None:
        self.address, self.check, self.bar = address, check, bar
        self.part = path.with_name(f"{path.name}.part")
        self.version = path.with_name(f"{path.name}.part.json")
        self._begun_anew = False

    def have(self) -> int:
        """Bytes that are here."""
        return self.part.stat().st_size if self.part.exists() else 0

    def forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.version.unlink(missing_ok=True)

    def fix(self) -> str:
        """What the user can do after the last try: not always is what is here of use to the next."""
        if not self.have():
            return AGAIN
        if self._begun_anew or not self._known():
            return f"{AGAIN}: it begins anew, for the server lets no download go on; --mirror takes another address"
        return f"{AGAIN}: what is done is kept"

    def attempt(self) -> None:
        """One request, from the first byte or from where the last one ended.

        Raises:
            Passing: it ended before the file did.
        """
        known = self._known()
        headers = {"Range": f"bytes={self.have()}-", "If-Range": next(iter(known.values()))} if known else {}
        try:
            with open_address(self.address, headers) as response:
                if response.status == 206:
                    self._check_continues(response, known)
                else:
                    self._begin_anew()
                self._receive(response)
        except _OutOfRange as failure:
            if failure.total != self.have():
                self._begin_anew()
                raise

    def _begin_anew(self) -> None:
        self._begun_anew = self._begun_anew or self.have() > 0
        self.forget()

    def _known(self) -> dict[str, str]:
        """The version that ``part`` is of, {} if there is no part or a server has not told."""
        known = read_json(self.version, "state of a download") if self.have() and self.version.exists() else {}
        return {name: str(value) for name, value in known.items()}

    def _check_continues(self, response: HTTPResponse, known: Mapping[str, str]) -> None:
        """Whether a partial answer is what is wanted; a server may not know ``If-Range``."""
        now = _version(response)
        same = all(now.get(name, value) == value for name, value in known.items())
        first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if not same or first is None or int(first[1]) != self.have():
            self._begin_anew()
            raise Passing("the file changed on the server, starting anew")

    def _receive(self, response: HTTPResponse) -> None:
        have = self.have()
        total = _total(response)
        self.check(total, have)
        if not have:
            with atomic_write(self.version) as temporary:
                temporary.write_text(json.dumps(_version(response)), encoding="utf-8")
        self.bar.total, self.bar.n, self.bar.initial = total, have, have
        with self.part.open("ab") as file:
            while (total is None or have < total) and (chunk := _read(response)):
                file.write(chunk)
                have += len(chunk)
                self.bar.update(len(chunk))
        if total is not None and have < total:
            raise Passing(f"the connection ended after {have} of {total} bytes")


def _version(response: HTTPResponse) -> dict[str, str]:
    """The marks of a file's version that ``If-Range`` takes, the best first. A weak ETag is none."""
    marks = {name: response.headers.get(name) for name in ("ETag", "Last-Modified")}
    return {name: mark for name, mark in marks.items() if mark and not mark.startswith("W/")}


def _total(response: HTTPResponse) -> int | None:
    """Bytes of the file, which a partial answer names behind its range; None if the server does not tell."""
    partial = response.headers.get("Content-Range", "").rpartition("/")[2]
    text = partial if response.status == 206 else response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _read(response: HTTPResponse) -> bytes:
    """What has arrived, b"" at the end."""
    try:
        return response.read1(CHUNK)
    except (OSError, HTTPException) as error:
        raise Passing(_reason(error)) from None


def _judged(error: HTTPError, address: str) -> Exception:
    said = f"{error.code} {error.reason}".strip()
    if error.code in GONE:
        return Gone(f"the server has no such file ({said})", address, "--mirror takes another address")
    if error.code == 416:
        total = re.match(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        return _OutOfRange(int(total[1]) if total else None)
    if error.code in PASSING or error.code >= 500:
        wait = error.headers.get("Retry-After", "")
        return Passing(f"the server says {said}", float(wait) if wait.isdecimal() else None)
    if error.code == PROXY_ASKS:
        return UserError(f"the proxy refuses ({said})", address, "see the environment's http_proxy, https_proxy")
    return Refused(f"the server refuses ({said})", address, "--mirror takes another address")


def _reason(error: OSError | HTTPException) -> str:
    inner = error.reason if isinstance(error, URLError) else error
    text = inner.strerror if isinstance(inner, OSError) and inner.strerror else str(inner)
    return text or type(inner).__name__


def _md5(path: Path, label: str) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, progress_bar(f"{label}, checksum", "B", path.stat().st_size) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()

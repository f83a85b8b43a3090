"""A loopback file server that misbehaves on request and counts the bytes that it sends.

    with FileServer() as server:
        file = server.put("a.zip", data, drop_after=[1000])     the first answer ends after 1000 bytes
        fetch(server.url("a.zip"), ...)
        file.requests                                           one `Request` for each

Does not import pytest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Barrier, BrokenBarrierError, Lock, Thread

ETAG = '"one"'


@dataclass
class Request:
    """A request: its headers, the status of the answer, and the number of bytes of its body."""

    range: str | None
    if_range: str | None
    status: int
    sent: int


@dataclass
class File:
    """A file and how it is served.

    ``ranges``, ``if_range``: whether the server knows ``Range`` and ``If-Range``; ``statuses``: of the first answers;
    ``drop_after``: the connections of the first answers with a body end after so many bytes; ``barrier``: requests wait
    here for each other, and fail (418) if not enough arrive.
    """

    content: bytes
    etag: str | None = ETAG
    modified: str | None = None
    ranges: bool = True
    if_range: bool = True
    length: bool = True
    longest: int | None = None
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: list[int] = field(default_factory=list)
    barrier: Barrier | None = None
    requests: list[Request] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Bytes of all answers' bodies."""
        return sum(request.sent for request in self.requests)


class FileServer:
    """Serves until the block ends."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self._lock = Lock()

    def __enter__(self) -> FileServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"

    def put(self, name: str, content: bytes, **how: object) -> File:
        """Serves ``content`` as ``name``; see `File` for ``how``."""
        self.files[name] = File(content, **how)  # type: ignore[arg-type]
        return self.files[name]

    def answer(self, call: BaseHTTPRequestHandler) -> None:
        """One request."""
        file = self.files.setdefault(call.path.lstrip("/"), File(b"", statuses=[404] * 1000))
        status, start, drop = self._decide(call, file)
        body = file.content[start:] if status in (200, 206) else b""
        if status == 206 and file.longest:
            body = body[: file.longest]
        sent = body[:drop]
        asked = call.headers.get("Range"), call.headers.get("If-Range")
        file.requests.append(Request(*asked, status, len(sent)))
        call.close_connection = True
        call.send_response(status)
        for name, value in self._headers(file, status, start, len(body)).items():
            call.send_header(name, value)
        call.end_headers()
        call.wfile.write(sent)

    def _decide(self, call: BaseHTTPRequestHandler, file: File) -> tuple[int, int, int | None]:
        """Status, first byte, bytes to send before the connection breaks."""
        if file.barrier is not None:
            try:
                file.barrier.wait(timeout=5)
            except BrokenBarrierError:
                return 418, 0, None
        with self._lock:
            if file.statuses:
                return file.statuses.pop(0), 0, None
            start, status = 0, 200
            asked = re.fullmatch(r"bytes=(\d+)-", call.headers.get("Range", ""))
            condition = call.headers.get("If-Range")
            same = not file.if_range or condition in (None, file.etag, file.modified)
            if asked and file.ranges and same:
                start, status = int(asked[1]), 206
            if start >= len(file.content) and status == 206:
                return 416, 0, None
            return status, start, file.drop_after.pop(0) if file.drop_after else None

    def _headers(self, file: File, status: int, start: int, length: int) -> dict[str, str]:
        headers = dict(file.headers)
        total = len(file.content)
        if status in (200, 206):
            if file.etag is not None:
                headers["ETag"] = file.etag
            if file.modified is not None:
                headers["Last-Modified"] = file.modified
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{total}"
        if status == 416:
            headers["Content-Range"] = f"bytes */{total}"
        if file.length or status not in (200, 206):
            headers["Content-Length"] = str(length)
        return headers

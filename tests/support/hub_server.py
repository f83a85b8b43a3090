"""A loopback server that speaks the download protocol of the Hugging Face hub, over a folder of repositories.

A data set's files lie as a model's do.

    with HubServer(root) as hub:            root/owner/name/<files>
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})

`requests` keeps (method, path) of all calls; files in `gated` answer 401; `uploads` takes commits from who has its
token, and hides its private repositories from others. No pytest in here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

from hub_upload import Answer, Uploads

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = re.compile(r"(/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
INFO = re.compile(r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
TREE = re.compile(r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")


class HubServer:
    """Serves until the block ends."""

    def __init__(self, root: Path, gated: tuple[str, ...] = ()) -> None:
        self.root, self.gated = root, gated
        self.requests: list[tuple[str, str]] = []
        self.uploads = Uploads(root)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_POST(self) -> None:
                hub.write(self, hub.uploads.post)

            def do_PUT(self) -> None:
                hub.write(self, hub.uploads.put)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, cache: Path) -> dict[str, str]:
        """What makes huggingface_hub ask this server and keep its files in `cache`."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def answer(self, call: BaseHTTPRequestHandler, body: bool) -> None:
        """One request."""
        path = unquote(urlsplit(call.path).path)
        self.requests.append((call.command, path))
        if path == "/api/models":
            return self._send(call, 200, {"Content-Type": "application/json"}, b"[]", body)
        found = next((match for pattern in (FILE, TREE, INFO) if (match := pattern.fullmatch(path))), None)
        repo = found["repo"] if found else "none"
        if found is None or not (self.root / repo).is_dir() or self._hidden(repo, call.headers["Authorization"]):
            return self._send(call, 404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
        commit = self._commit_of(repo, found["revision"])
        if commit is None:
            return self._send(call, 404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        repository = self.root / repo if commit == COMMIT else self.uploads.folder_at(repo, commit)
        if found.re is FILE:
            return self._send_file(call, repository, found["file"], commit, body)
        if found.re is TREE and not (repository / (found["folder"] or "")).is_dir():
            return self._send(call, 404, {"X-Error-Code": "EntryNotFound"}, b"{}", body)
        files = [str(f.relative_to(repository)) for f in sorted(repository.rglob("*")) if f.is_file()]
        if found.re is TREE:
            answer: object = [{"type": "file", "path": f, "size": 0, "oid": commit} for f in files]
        else:
            siblings = [{"rfilename": f} for f in files]
            answer = {"id": repo, "sha": commit, "private": repo in self.uploads.private, "siblings": siblings}
        self._send(call, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

    def write(self, call: BaseHTTPRequestHandler, take: Callable[..., Answer]) -> None:
        """One POST or PUT. Where a large file is put needs no token: its address is a secret on the real hub."""
        path = unquote(urlsplit(call.path).path)
        self.requests.append((call.command, path))
        length = call.headers["Content-Length"]
        content = read_chunks(call) if length is None else call.rfile.read(int(length))
        if call.command == "PUT":
            status, answer = take(path, content)
        elif self.uploads.may_write(call.headers["Authorization"]):
            status, answer = take(path, content, self.address)
        else:
            status, answer = 401, {"error": "Invalid username or password."}
        self._send(call, status, {"Content-Type": "application/json"}, json.dumps(answer).encode(), True)

    def _hidden(self, repo: str, authorization: str | None) -> bool:
        return repo in self.uploads.private and not self.uploads.may_write(authorization)

    def _commit_of(self, repo: str, revision: str | None) -> str | None:
        """What a revision means; None if there is none. What was not uploaded has one commit."""
        head = self.uploads.head(repo) or COMMIT
        if revision in (None, "main", head):
            return head
        return revision if revision in self.uploads.commits.get(repo, []) else None

    def _send_file(self, call: BaseHTTPRequestHandler, repository: Path, name: str, commit: str, body: bool) -> None:
        path = repository / name
        if name in self.gated:
            self._send(call, 401, {"X-Error-Code": "GatedRepo"}, b"{}", body)
        elif not path.is_file():
            self._send(call, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"", body)
        else:
            content = path.read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(call, 200, headers, content, body)

    def _send(
        self, call: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, body: bool
    ) -> None:
        call.send_response(status)
        for name, value in headers.items():
            call.send_header(name, value)
        call.send_header("Content-Length", str(len(content)))
        call.end_headers()
        if body:
            call.wfile.write(content)


def read_chunks(call: BaseHTTPRequestHandler) -> bytes:
    """A request body of unknown length (Transfer-Encoding: chunked)."""
    parts = []
    while size := int(call.rfile.readline().strip() or b"0", 16):
        parts.append(call.rfile.read(size))
        call.rfile.readline()
    call.rfile.readline()
    return b"".join(parts)

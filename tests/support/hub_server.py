"""A loopback server that speaks the download protocol of the Hugging Face hub, over a folder of repositories.

    with HubServer(root) as hub:            root/owner/name/<files>
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})

`requests` keeps (method, path) of all calls; files in `gated` answer 401. No pytest in here.
"""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
REVISIONS = ("main", COMMIT)


class HubServer:
    """Serves until the block ends."""

    def __init__(self, root: Path, gated: tuple[str, ...] = ()) -> None:
        self.root, self.gated = root, gated
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

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
        repository = self.root / found["repo"] if found else self.root / "none"
        if found is None or not repository.is_dir():
            self._send(call, 404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
        elif found["revision"] not in (None, *REVISIONS):
            self._send(call, 404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        elif found.re is TREE and not (repository / (found["folder"] or "")).is_dir():
            self._send(call, 404, {"X-Error-Code": "EntryNotFound"}, b"{}", body)
        elif found.re is FILE:
            self._send_file(call, repository, found["file"], body)
        else:
            files = [str(f.relative_to(repository)) for f in sorted(repository.rglob("*")) if f.is_file()]
            if found.re is TREE:
                answer: object = [{"type": "file", "path": f, "size": 0, "oid": COMMIT} for f in files]
            else:
                answer = {"id": found["repo"], "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            self._send(call, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

    def _send_file(self, call: BaseHTTPRequestHandler, repository: Path, name: str, body: bool) -> None:
        path = repository / name
        if name in self.gated:
            self._send(call, 401, {"X-Error-Code": "GatedRepo"}, b"{}", body)
        elif not path.is_file():
            self._send(call, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", body)
        else:
            content = path.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
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

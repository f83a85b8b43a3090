"""The upload side of the loopback hub: what huggingface_hub sends for `create_repo` and `create_commit`.

    POST /api/repos/create                       a repository is a folder
    POST /api/validate-yaml                      the metadata of README.md
    POST /api/models/R/preupload/REVISION        which files go the way of large files
    POST /R.git/info/lfs/objects/batch           where large files are put
    PUT  /lfs/OID, POST /lfs/OID/verify          large files
    POST /api/models/R/commit/REVISION           one JSON object a line: header, file (base64), lfsFile

Every commit is kept, so that a revision can be asked for. No pytest in here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

REPO = r"(?P<repo>[^/]+/[^/]+)"
PREUPLOAD = re.compile(rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
COMMIT = re.compile(rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
BATCH = re.compile(rf"/{REPO}\.git/info/lfs/objects/batch")
OBJECT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})(?P<verify>/verify)?")
LARGE_FILES = (".safetensors", ".bin")  # the hub's .gitattributes for models
Answer = tuple[int, dict[str, object]]


@dataclass
class Uploads:
    """``token``: what a writer must send; ``commits``: of each repository, the newest last."""

    root: Path
    token: str = "hf_loopback"
    private: set[str] = field(default_factory=set)
    commits: dict[str, list[str]] = field(default_factory=dict)
    _objects: dict[str, bytes] = field(default_factory=dict)

    def may_write(self, authorization: str | None) -> bool:
        return authorization == f"Bearer {self.token}"

    def head(self, repo: str) -> str | None:
        """The newest commit; None where nothing was uploaded."""
        return self.commits[repo][-1] if self.commits.get(repo) else None

    def folder_at(self, repo: str, commit: str) -> Path:
        """The repository as it was after a commit."""
        return self.root / ".commits" / repo / commit

    def post(self, path: str, body: bytes, address: str) -> Answer:
        """Status and JSON answer of one POST."""
        if path == "/api/repos/create":
            return self._create(json.loads(body), address)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if found := OBJECT.fullmatch(path):
            size = len(self._objects.get(found["oid"], b""))
            return (200, {}) if size == json.loads(body)["size"] else (400, {"error": "size"})
        found = PREUPLOAD.fullmatch(path) or COMMIT.fullmatch(path) or BATCH.fullmatch(path)
        if found is None or not (self.root / found["repo"]).is_dir():
            return 404, {"error": "no such repository"}
        if found.re is PREUPLOAD:
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if found.re is BATCH:
            return 200, {"transfer": "basic", "objects": [self._place(o, address) for o in json.loads(body)["objects"]]}
        return self._commit(found["repo"], [json.loads(line) for line in body.splitlines()], address)

    def put(self, path: str, body: bytes) -> Answer:
        """A large file; its name is its SHA-256."""
        found = OBJECT.fullmatch(path)
        if found is None or hashlib.sha256(body).hexdigest() != found["oid"]:
            return 400, {"error": "no object of this hash"}
        self._objects[found["oid"]] = body
        return 200, {}

    def _create(self, asked: dict[str, object], address: str) -> Answer:
        owner = asked.get("organization") or "me"
        repo = f"{owner}/{asked['name']}"
        answer: dict[str, object] = {"url": f"{address}/{repo}", "name": repo}
        if (self.root / repo).is_dir():
            return 409, answer
        (self.root / repo).mkdir(parents=True)
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repo)
        return 200, answer

    def _validate(self, content: str) -> Answer:
        if re.match(r"---\n(.+\n)+---\n", content):
            return 200, {"errors": [], "warnings": []}
        return 400, {"errors": [{"message": "no metadata"}], "warnings": []}

    def _mode(self, path: str) -> dict[str, object]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE_FILES) else "regular", "shouldIgnore": False}

    def _place(self, asked: dict[str, object], address: str) -> dict[str, object]:
        """Upload instructions, none for what is here already."""
        about = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self._objects:
            return about
        href = f"{address}/lfs/{asked['oid']}"
        return {**about, "actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}

    def _commit(self, repo: str, lines: list[dict], address: str) -> Answer:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self._objects[value["oid"]]
            else:
                continue
            (self.root / repo / value["path"]).write_bytes(content)
        commit = hashlib.sha1(json.dumps([repo, len(self.commits.get(repo, [])), lines]).encode()).hexdigest()
        shutil.copytree(self.root / repo, self.folder_at(repo, commit))
        self.commits.setdefault(repo, []).append(commit)
        return 200, {"commitUrl": f"{address}/{repo}/commit/{commit}", "commitOid": commit, "success": True}

"""The repository's own files. No pytest in here."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FULL_PARITY = Path(os.environ.get("MSD_FIXTURES") or REPO.parent / "shared" / "fixtures")
"""Folder of the larger set of reference values, which the repository has a part of (tests/fixtures/parity)."""


@cache
def repository_files() -> tuple[Path, ...]:
    """Files that git tracks or would add; all files where there is no git."""
    listing = ["git", "-C", str(REPO), "ls-files", "-co", "--exclude-standard", "-z"]
    if shutil.which("git") and (REPO / ".git").exists():
        names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")
        found = [REPO / name for name in names if name]
    else:
        found = [p for p in REPO.rglob("*") if not {".venv", "__pycache__"} & set(p.parts)]
    return tuple(sorted(p for p in found if p.is_file()))

"""Settings shared by the tests of all packages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent
sys.path.insert(0, str(REPO / "tests" / "support"))


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder of the reference values: env MSD_FIXTURES, else `shared/fixtures` beside the repository, else a skip."""
    folder = Path(os.environ.get("MSD_FIXTURES") or REPO.parent / "shared" / "fixtures")
    if not folder.is_dir():
        pytest.skip(f"no reference values in {folder} (set MSD_FIXTURES)")
    return folder

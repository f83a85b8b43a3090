"""Settings shared by the tests of all packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent
LONGEST = "test_pipeline.py"
sys.path.insert(0, str(REPO / "tests" / "support"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest goes first, so that another process does not wait for it at the end."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(scope="session", autouse=True)
def costs_of_a_made_up_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trees adapt to the same costs in every run; what other processes measure is kept in a folder of its own."""
    from eagle.decode import msd
    from eagle.decode.adaptive.planner import CostCurve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSD_CACHE", str(tmp_path_factory.getbasetemp().parent / "msd-cache"))
        patch.setattr(msd, "cost_of", lambda *_: CostCurve((1, 8, 32), (10.0, 11.0, 16.0), 1.0, 2.0))
        yield


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder of the reference values: env MSD_FIXTURES, else `shared/fixtures` beside the repository, else a skip."""
    folder = Path(os.environ.get("MSD_FIXTURES") or REPO.parent / "shared" / "fixtures")
    if not folder.is_dir():
        pytest.skip(f"no reference values in {folder} (set MSD_FIXTURES)")
    return folder

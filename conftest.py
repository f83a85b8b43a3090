"""Settings shared by the tests of all packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent
LONGEST = "test_pipeline.py"
sys.path.insert(0, str(REPO / "tests" / "support"))

from repository import FULL_PARITY  # noqa: E402


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


@pytest.fixture(scope="session", autouse=True)
def no_self_check() -> Iterator[None]:
    """Tests break the engine on purpose, which the check at load would refuse. It has its own tests, and runs in
    commands that are started as processes."""
    from eagle.decode import msd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(msd, "check_target", lambda _: True)
        yield


@pytest.fixture(scope="session", params=["small", "full"] if FULL_PARITY.is_dir() else ["small"])
def parity_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of reference values: those of the repository, and the larger set (env MSD_FIXTURES, or `shared/fixtures`
    beside the repository) if it is there."""
    if request.param == "small":
        from parity_fixture import expand

        return expand(REPO / "tests" / "fixtures" / "parity", tmp_path_factory.mktemp("parity") / "small")
    return FULL_PARITY


@pytest.fixture(autouse=True)
def gradients_are_on() -> None:
    """Importing lmms-eval's models switches gradients off for the whole process."""
    import torch

    torch.set_grad_enabled(True)

"""Settings shared by the tests of all packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent
LONGEST = (
    "test_deepspeed.py",
    "test_end_to_end.py",
    "test_readme_commands.py",
    "test_script.py",
    "test_pipeline.py",
    "test_generation_config.py",
    "test_compiled.py",
    "test_eagle3.py",
    "test_experiments.py",
    "test_families_pipeline.py",
    "test_browser.py",
    "test_stopped.py",
    "test_reference_parity.py",
    "test_run.py",
)
sys.path.insert(0, str(REPO / "tests" / "support"))

from repository import FULL_PARITY  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest go first, so that no process waits for them at the end."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


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
    from eagle.ge_data import extract

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(msd, "check_target", lambda _: True)
        patch.setattr(extract, "self_check", lambda _: True)
        yield


@pytest.fixture(scope="session", params=["small", pytest.param("full", marks=pytest.mark.slow)])
def parity_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of reference values: those of the repository, and the larger set (env MSD_FIXTURES, or `shared/fixtures`
    beside the repository) if it is there."""
    if request.param == "small":
        from parity_fixture import expand

        return expand(REPO / "tests" / "fixtures" / "parity", tmp_path_factory.mktemp("parity") / "small")
    if not FULL_PARITY.is_dir():
        pytest.skip(f"no larger set of reference values in {FULL_PARITY}")
    return FULL_PARITY


@pytest.fixture(autouse=True)
def gradients_are_on() -> None:
    """Importing lmms-eval's models switches gradients off for the whole process."""
    import torch

    torch.set_grad_enabled(True)

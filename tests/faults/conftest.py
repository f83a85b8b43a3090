"""A tiny pair, tiny training data, and a disk that is full."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from fault_support import hear_ctrl_c
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian

from eagle.families import load_target

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "EAGLE" / "tests" / "train"))

Limit = Callable[[int], AbstractContextManager[None]]
Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``draft`` and ``a.png`` in one folder."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_liuhaotian(folder / "base")
    make_draft(folder / "draft", load_target(base, dtype=torch.float32), agree=1.0)
    make_image(folder / "a.png")
    return folder


@pytest.fixture
def own_pair(pair: Path, tmp_path: Path) -> Path:
    """A copy of the pair to be spoilt, with the tower that lies beside the base."""
    return shutil.copytree(pair, tmp_path / "pair")


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a tiny training: 12 samples, 2 steps an epoch."""
    from train_support import write_base, write_configs, write_corpus

    base, text = write_base(tmp_path / "base"), write_corpus(tmp_path / "text", 12)

    def make(*extra: str, **train: object) -> list[str]:
        config, deepspeed = write_configs(tmp_path, **train)
        return ["--basepath", str(base), "--tmpdir_t", str(text), "--cpdir", str(tmp_path / "ck"), "--tracker", "none",
                "--config", str(config), "--deepspeed_config", str(deepspeed), *extra]  # fmt: skip

    return make


@pytest.fixture
def full_at() -> Limit:
    """No file of this process grows over so many bytes; the system then says what it says of a full disk, by another
    number."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command of this Python in the background, in a group of processes of its own if that is wanted; what
    still runs at the end is killed."""
    running: list[subprocess.Popen] = []

    def begin(*command: str, own_group: bool = False) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPO / name) for name in ("LLaVA", "EAGLE", "lmms-eval")]),
            "OMP_NUM_THREADS": "1",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, *command], env=environment, preexec_fn=hear_ctrl_c,
                                   start_new_session=own_group, **pipes)  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()

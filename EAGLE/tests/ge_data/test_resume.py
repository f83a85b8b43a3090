"""Killed at any moment and started again: each row is there exactly once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eagle.ge_data import inspect
from eagle.ge_data.index import read_about
from eagle.ge_data.shards import ShardDataset
from llava.errors import run_cli

from .conftest import Write, allocate, command, rows_of, text_row


def kill(base: Path, data: Path, out: Path, kills: int, seed: int) -> int:
    """Starts the command again and again and kills it at random moments; returns how many kills met it at work."""
    arguments = [sys.executable, "-m", "eagle.ge_data.allocation", *command(base, data, out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    moments, met = random.Random(seed), 0
    for _ in range(kills):
        began, before = time.monotonic(), len(list(out.glob("rows-*")))
        process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("rows-*"))) == before and time.monotonic() < began + 60:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        met += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all(read_about(path)["end"] for path in out.glob("rows-*")), "a shard that is there is whole"
    return met


def check_killed(base: Path, annotations: Write, tmp_path: Path, rows: int, kills: int) -> None:
    data, out = annotations([text_row(n, n % 4 + 1) for n in range(rows)]), tmp_path / "out"
    assert kill(base, data, out, kills, seed=1) >= kills / 2
    assert allocate(base, data, out) == 0
    assert sorted(rows_of(out)[0]) == list(range(rows))
    assert allocate(base, data, tmp_path / "whole") == 0
    for first, second in zip(ShardDataset(out), ShardDataset(tmp_path / "whole"), strict=True):
        assert first.id == second.id and torch.equal(first.hidden, second.hidden)
    assert run_cli(lambda: inspect.main([str(out)])) == 0


def test_killed_and_resumed(base: Path, annotations: Write, tmp_path: Path) -> None:
    check_killed(base, annotations, tmp_path, rows=100, kills=2)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed(base: Path, annotations: Write, tmp_path: Path) -> None:
    check_killed(base, annotations, tmp_path, rows=1500, kills=20)

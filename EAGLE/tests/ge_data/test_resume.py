"""Killed at any moment and started again: each row is there exactly once, and no finished shard is touched."""

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
from corpus_support import Write, allocate, command, image_record, rows_of, text_record

from eagle.ge_data import inspect
from eagle.hidden_states.index import load_index, read_header, sha256
from eagle.hidden_states.shards import ShardDataset
from llava.errors import run_cli


def shards_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and checksum of each finished shard."""
    return {path.name: (path.stat().st_mtime_ns, sha256(path)) for path in folder.glob("rows-*")}


def kill(arguments: list[str], out: Path, kills: int, seed: int) -> int:
    """Starts the command again and again and kills it: twice of three times soon after a new shard, else at any moment
    from its start to well after its first shard. Returns how many kills met it at work."""
    line = [sys.executable, "-m", "eagle.ge_data.allocation", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    moments, met, usual = random.Random(seed), 0, 10.0
    for number in range(kills):
        before, began = shards_of(out), time.monotonic()
        process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if number % 3 == 2:
            time.sleep(moments.uniform(0, 1.3 * usual))
        else:
            while process.poll() is None and len(list(out.glob("rows-*"))) == len(before):
                assert time.monotonic() < began + 600, "it hangs"
                time.sleep(0.002)
            usual = time.monotonic() - began
            time.sleep(moments.uniform(0, 0.05))
        met += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = shards_of(out)
        assert {name: after.get(name) for name in before} == before, "a finished shard was touched"
        assert all(read_header(out / name).end for name in after), "a shard that is there is whole"
    return met


def check_killed(
    base: Path, annotations: Write, tmp_path: Path, pictures: Path, rows: int, kills: int, gpus: str = "cpu"
) -> None:
    """One worker reads text, two read pictures."""
    kind = "t" if gpus == "cpu" else "v"
    made = [text_record(n, n % 4 + 1) if kind == "t" else image_record(n, "ab"[n % 2] + ".png") for n in range(rows)]
    data, out = annotations(made), tmp_path / "out"
    arguments = command(base, data, out, kind, "--gpus", gpus, pictures=pictures)
    assert kill(arguments, out, kills, seed=1) >= kills / 2
    assert allocate(base, data, out, kind, pictures=pictures) == 0
    assert sorted(rows_of(out)[0]) == list(range(rows))
    assert all(shard.sha256 == sha256(out / shard.file) for shard in load_index(out).shards)
    assert allocate(base, data, tmp_path / "whole", kind, pictures=pictures) == 0
    for first, second in zip(ShardDataset(out), ShardDataset(tmp_path / "whole"), strict=True):
        assert first.id == second.id and torch.equal(first.hidden, second.hidden)
    assert run_cli(lambda: inspect.main([str(out)])) == 0


@pytest.mark.slow
def test_killed_and_resumed(base: Path, annotations: Write, tmp_path: Path, pictures: Path) -> None:
    check_killed(base, annotations, tmp_path, pictures, rows=100, kills=2)


@pytest.mark.by_hand
@pytest.mark.parametrize("gpus", ["cpu", "cpu,cpu"])
def test_killed_twenty_times_and_resumed(
    base: Path, annotations: Write, tmp_path: Path, pictures: Path, gpus: str
) -> None:
    check_killed(base, annotations, tmp_path, pictures, rows=1500, kills=21, gpus=gpus)

"""The worker processes, and the progress over all of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_support import Write, allocate, rows_of, text_record

from eagle.ge_data import allocation
from eagle.ge_data.allocation import AllocationProgress, devices
from eagle.ge_data.extract import Extractor
from eagle.ge_data.workers import Events, Failure, Job, _ctrl_c_blocked, run_here, threads
from eagle.hidden_states.index import INDEX, ShardInfo, load_index
from eagle.hidden_states.source import Source
from llava.errors import UserError

from ..hidden_states.test_shards import SOURCE


def test_one_worker_for_each_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices(None) == ["cuda:0", "cuda:1"]
    assert devices("1, 0") == ["cuda:1", "cuda:0"] and devices("cpu") == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices(None) == [] and devices("cpu,cpu") == ["cpu", "cpu"]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named_and_the_other_finishes(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real processes; one ends by SIGKILL when the first shard is there. The next run makes what it had begun."""
    rows, kept, killed = 60, AllocationProgress.add_shard, []

    def shard(self: AllocationProgress, source: Source, info: ShardInfo) -> None:
        kept(self, source, info)
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(AllocationProgress, "add_shard", shard)
    data, out = annotations([text_record(n) for n in range(rows)]), tmp_path / "out"
    assert allocate(base, data, out, "t", "--gpus", "cpu,cpu") == 1
    assert "error: worker cpu failed: ended with status -9 without a message" in capsys.readouterr().err
    begun = 3  # ranges that a worker holds: one it writes, one it reads, one it prepares
    assert rows // 3 - begun <= len(load_index(out).shards) <= rows // 3
    assert allocate(base, data, out, "t", "--gpus", "cpu,cpu") == 0
    assert len(killed) == 1 and sorted(rows_of(out)[0]) == list(range(rows))


@pytest.mark.parametrize(
    ("devices", "cores", "share"), [("cpu", 8, 8), ("cpu,cpu", 8, 4), ("cuda:0,cuda:1", 96, 48), ("cpu,cpu,cpu", 2, 1)]
)
def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch, devices: str, cores: int, share: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert threads(devices.split(",")) == share


def test_progress_counts_samples_tokens_time_and_disk(tmp_path: Path) -> None:
    """Of all workers together, and of the shards that were there before."""
    before = ShardInfo("rows-00000000-00000010.safetensors", 0, 10, 10, 0, 0, {}, 10**9)
    new = ShardInfo("rows-00000010-00000020.safetensors", 10, 20, 8, 0, 0, {"empty": 2}, 2 * 10**9)
    progress = AllocationProgress(tmp_path, [before], records=100, waiting=90)
    try:
        assert str(progress.bar).count("10/100") == 1
        progress.update(4, 600)
        assert "1.00 GB" in str(progress.bar) and " of " not in str(progress.bar)
        progress.update(6, 900)
        progress.add_shard(SOURCE, new)
        progress.update(5, 500)
        shown = str(progress.bar)
    finally:
        progress.bar.close()
    assert "25/100" in shown and progress.tokens == 2000
    assert re.search(r"<\d\d:\d\d, +[\d.]+ ?k?sample/s", shown), "time that is left, and the rate"
    assert re.search(r" [1-9]\d* tokens/s, 3\.00 GB of 19\.00 GB\]", shown), "1 GB and 90 rows of 0.2 GB"
    assert [shard["start"] for shard in json.loads((tmp_path / INDEX).read_text())["shards"]] == [0, 10]


FAILURES = [
    Failure("cuda:0", "ended with status -9 without a message", False),
    Failure("cuda:1", "shard cannot be written (no room)", True),
    Failure("cuda:2", "another defect", False),
]


@pytest.mark.parametrize("shards", [0, 1])
@pytest.mark.parametrize("kinds", ["defects", "bad input too"])
def test_all_failures_are_said_and_what_is_there_is_summed_up(
    base: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], shards: int, kinds: str,
) -> None:  # fmt: skip
    failures = [failure for failure in FAILURES if kinds == "bad input too" or not failure.user]

    def fail(job: Job, ranges: Any, devices: Any, events: Events) -> list[Failure]:
        run_here(job, ranges[:shards], events)
        return failures

    monkeypatch.setattr(allocation, "run_workers", fail)
    monkeypatch.setattr(allocation, "devices", lambda gpus: ["cuda:0", "cuda:1", "cuda:2"])
    data, out = annotations([text_record(0), {"id": "x"}, *(text_record(n) for n in range(1, 6))]), tmp_path / "out"
    assert allocate(base, data, out) == (2 if kinds == "bad input too" else 1)
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert errors[: len(failures)] == [f"error: worker {f.device} failed: {f.message}" for f in failures]
    last = ["error: shard cannot be written (no room): worker cuda:1"] if kinds == "bad input too" else []
    assert errors[len(failures) :] == last
    assert ("samples" in said.out) == bool(shards) == (out / "skipped.jsonl").exists()


def test_bad_input_half_way_leaves_what_is_there_summed_up(
    base: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, without workers."""
    write = Extractor._write

    def fail(self: Extractor, span: tuple[int, int], outcome: Any) -> ShardInfo:
        if span[0]:
            raise UserError("shard cannot be written (no room)")
        return write(self, span, outcome)

    monkeypatch.setattr(Extractor, "_write", fail)
    data, out = annotations([text_record(n) for n in range(7)]), tmp_path / "out"
    assert allocate(base, data, out) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "error: shard cannot be written (no room)"
    assert "samples" in said.out and (out / "skipped.jsonl").exists() and load_index(out).samples == 3


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "full"), [(10**3, True), (10**9, False)])
def test_a_disk_that_will_be_full_is_said_once(
    base: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], free: int, full: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
    data = annotations([text_record(n) for n in range(9)])
    assert allocate(base, data, tmp_path / "out") == 0, "a note, no refusal"
    error = capsys.readouterr().err
    assert error.count("the disk will be full before the end") == full
    assert not full or re.search(r"end: \d+\.\d\d kB are still to come, 1\.00 kB are free \(--hidden-dtype int8", error)


@pytest.mark.parametrize(("replaced", "said"), [(0, 1), (10**9, 0)])
def test_shards_that_are_replaced_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int, said: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 10**9))
    notes: list[str] = []
    progress = AllocationProgress(tmp_path, [], records=30, waiting=30, notify=notes.append, replaced=replaced)
    for start in (0, 10):
        name = f"rows-{start:08d}-{start + 10:08d}.safetensors"
        progress.add_shard(SOURCE, ShardInfo(name, start, start + 10, 10, 0, 0, {}, 9 * 10**8))
    progress.bar.close()
    assert len(notes) == said and all("1.80 GB are still to come, 1.00 GB are free" in note for note in notes)


def test_ctrl_c_waits_for_a_worker_that_is_started() -> None:
    """Also if a thread that does not block the signal receives it, such as a progress bar's."""
    finished, handler = False, signal.getsignal(signal.SIGINT)
    end = threading.Event()
    threading.Thread(target=end.wait, daemon=True).start()
    with pytest.raises(KeyboardInterrupt), _ctrl_c_blocked():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.001)
        finished = True
    end.set()
    assert finished and signal.getsignal(signal.SIGINT) is handler

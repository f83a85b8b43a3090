"""Commands that are stopped: Ctrl-C is one line, a kill loses nothing that is finished, two runs share no folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from fault_support import text_rows

from eagle.ge_data import allocation, convert
from eagle.hidden_states.shards import ShardDataset
from eagle.locks import lock_folder
from eagle.train import main_deepspeed
from eagle.train.checkpoint import CheckpointStore
from llava.errors import UserError, run_cli

Start = Callable[..., subprocess.Popen]
PATIENCE = 600  # seconds until a command that does nothing is given up


def when(process: subprocess.Popen, true: Callable[[], bool]) -> None:
    """Waits until something is true of a running command."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, "the command ended too early"
        time.sleep(0.005)


def stop(process: subprocess.Popen, how: signal.Signals) -> tuple[int, str]:
    """Exit status and stderr after a signal."""
    process.send_signal(how)
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def corpus(pair: Path, folder: Path, rows: int) -> list[str]:
    """Arguments of an allocation of one shard a row."""
    data = folder / "rows.json"
    data.write_text(json.dumps(text_rows(rows, length=20)))
    return ["--outdir", str(folder / "out"), "--model_type", "llava_v15_t", "--model", str(pair / "base"), "--gpus",
            "cpu", "--image_data_path", str(folder), "--json_data_path", str(data), "--shard-size", "1"]  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_hidden_states(start: Start, pair: Path, tmp_path: Path, how: signal.Signals) -> None:
    arguments, out = corpus(pair, tmp_path, 150), tmp_path / "out"
    process = start("-m", "eagle.ge_data.allocation", *arguments)
    when(process, lambda: len(list(out.glob("rows-*"))) > 3)
    status, errors = stop(process, how)
    assert status == (130 if how == signal.SIGINT else -how), errors
    assert "Traceback" not in errors
    assert ("stopped; finished shards are kept, and the same command resumes\n" in errors) == (how == signal.SIGINT)
    kept = {path.name: path.read_bytes() for path in out.glob("rows-*")}
    assert 3 < len(kept) < 150
    assert run_cli(lambda: allocation.main(arguments)) == 0
    assert len(ShardDataset(out)) == 150 and not list(out.glob(".*.tmp*"))
    assert all((out / name).read_bytes() == data for name, data in kept.items())


@pytest.mark.parametrize("shards", [0, 2], ids=["starting", "at work"])
@pytest.mark.slow
def test_hidden_states_of_two_workers_stopped_by_ctrl_c(start: Start, pair: Path, tmp_path: Path, shards: int) -> None:
    """The terminal tells every process of the group; none of them says a word, none stays, and what is there is
    whole."""
    arguments, out = corpus(pair, tmp_path, 60), tmp_path / "out"
    both = ["cpu,cpu" if word == "cpu" else word for word in arguments]
    process = start("-m", "eagle.ge_data.allocation", *both, own_group=True)
    when(process, lambda: group_size(process.pid) >= 3 and len(list(out.glob("rows-*"))) >= shards)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert ends(process.pid), "a worker stays"
    there = list(out.glob("rows-*"))
    assert shards <= len(there) < 60 and (not there or len(list(ShardDataset(out))) == len(there))
    with lock_folder(out):
        pass


def group_size(group: int) -> int:
    """Processes of a group, a worker at its start included."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid="], capture_output=True, text=True, check=True).stdout.split()
    return listed.count(str(group))


def ends(group: int) -> bool:
    """Whether the last process of a group ends soon."""
    deadline = time.monotonic() + 60
    while group_size(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group_size(group)


@pytest.mark.slow
def test_training_stopped_by_ctrl_c(
    start: Start, training: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = training(epochs=400, save_every=2)
    process = start(str(main_deepspeed.__file__), *arguments)
    when(process, (tmp_path / "ck" / "latest").exists)
    status, errors = stop(process, signal.SIGINT)
    assert (
        status == 130
        and "Traceback" not in errors
        and "stopped; the same command with --resume resumes from " in errors
    )
    assert re.search(rf"resumes from {tmp_path}/ck/step-\d+\n", errors)
    monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *arguments, "--resume", "--max-steps", "1"])
    assert run_cli(main_deepspeed.main) == 0
    found = re.search(r"resumed after step (\d+)", capsys.readouterr().out)
    assert found and int(found.group(1)) % 2 == 0
    assert not list((tmp_path / "ck").glob(".tmp-*"))


def test_a_second_training_is_refused_and_the_first_unharmed(
    training: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The second would take the first one's unfinished checkpoint for what a killed run left."""
    arguments = training(epochs=3)
    (tmp_path / "ck").mkdir()
    held = ExitStack()
    held.enter_context(lock_folder(tmp_path / "ck"))
    (tmp_path / "ck" / ".tmp-step-00000002").mkdir()
    for more in ([], ["--resume"]):
        monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *arguments, *more])
        assert run_cli(main_deepspeed.main) == 2
        assert "another run is writing to this folder" in capsys.readouterr().err
    assert (tmp_path / "ck" / ".tmp-step-00000002").is_dir()
    held.close()
    assert run_cli(main_deepspeed.main) == 0


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    first = CheckpointStore(tmp_path / "ck", 1, {})
    first.lock()
    with pytest.raises(UserError, match="another run is writing to this folder"):
        CheckpointStore(tmp_path / "ck", 1, {}).lock()
    first.close()
    second = CheckpointStore(tmp_path / "ck", 1, {})
    second.lock()
    second.close()


def test_conversion_killed_at_work_leaves_the_old_file(start: Start, tmp_path: Path) -> None:
    """The new file appears whole or not at all."""
    rows, out = tmp_path / "rows.json", tmp_path / "out.json"
    rows.write_text(json.dumps(text_rows(60_000)))
    out.write_text("old")
    command = ["--input", str(rows), "--output", str(out)]
    process = start("-m", "eagle.ge_data.convert", *command)
    when(process, lambda: any(part.stat().st_size for part in tmp_path.glob(".out.json.*")))
    status, _ = stop(process, signal.SIGKILL)
    assert status == -signal.SIGKILL and out.read_text() == "old"
    assert run_cli(lambda: convert.main(command)) == 0
    assert len(json.loads(out.read_text())) == 60_000


@pytest.mark.slow
def test_an_answer_stopped_by_ctrl_c(start: Start, pair: Path) -> None:
    models = ["--base-model", str(pair / "base"), "--msd-model", str(pair / "draft"), "--dtype", "float32"]
    process = start(
        "-u", "-m", "eagle.cli", "generate", *models, "--prompt", "Name a river.", "--max-new-tokens", "5000"
    )
    assert process.stdout is not None and process.stdout.read(1)
    status, errors = stop(process, signal.SIGINT)
    assert status == 130 and "Traceback" not in errors and errors.endswith("stopped\n")

"""Whole runs through DeepSpeed's launcher, with one process and with two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fault_support import MakesFolder
from online_support import Case
from train_support import SCRIPT, assert_same_curve, curve, environment, launch

from eagle.drafts.checkpoint import load_draft


def launched(processes):
    """The launcher's part of the documented command."""
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).parent / "deepspeed")
    where = ["--include", "localhost:0"] if processes == 1 else ["--num_accelerators", str(processes)]
    return [launcher, "--master_port", "29517", *where]


BY_HAND = [pytest.param(*case, marks=pytest.mark.by_hand) for case in ((2, 2, 1), (1, 1, 2), (0, 2, 1))]


@pytest.fixture
def command(arguments):
    """The documented command for 1 or 2 processes, from inside eagle/train, with the shipped ds_config.json."""

    def make(processes, cpdir, *extra, **train):
        argv = arguments(cpdir, "--tracker", "none", *extra, deepspeed="ds_config.json", **train)
        return [*launched(processes), "main_deepspeed.py", *argv]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.by_hand)])
def test_deepspeed_command_and_resume(command, tmp_path, processes):
    """Stopped and resumed, between two logs. The state does not have the frozen embedding, which is the base's."""
    assert f"x {processes} processes" in launch(command(processes, "whole", log_every=3))
    launch(command(processes, "parts", "--max-steps", "2", log_every=3))
    file, *_ = (tmp_path / "parts").glob("step-*/state/state/mp_rank_*_model_states.pt")
    saved = torch.load(file, weights_only=False)["module"]
    assert "draft.fc.weight" in saved and "draft.embed_tokens.weight" not in saved
    assert "resumed after step 2" in launch(command(processes, "parts", "--resume", log_every=3))
    assert load_draft(tmp_path / "whole" / "final").fc.weight.dtype == torch.bfloat16
    assert_same_curve(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "first", "then"), [(2, 1, 2), *BY_HAND])
def test_resumed_with_another_number_of_processes(arguments, tmp_path, stage, first, then):
    """The same batches, on one process or on two: the losses and the draft of a run without the change."""

    def call(cpdir, processes, *extra):
        config = tmp_path / f"ds-{processes}.json"
        sizes = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5}
        config.write_text(json.dumps({**sizes, "zero_optimization": {"stage": stage}}))
        argv = arguments(cpdir, "--tracker", "none", *extra, deepspeed=config, log_every=3)
        return launch([*launched(processes), "main_deepspeed.py", *argv])

    call("whole", first)
    call("parts", first, "--max-steps", "4")
    assert "resumed after step 4" in call("parts", then, "--resume")
    assert_same_curve(tmp_path / "whole", tmp_path / "parts")
    drafts = [load_draft(tmp_path / name / "final").state_dict() for name in ("whole", "parts")]
    for name, weight in drafts[0].items():
        torch.testing.assert_close(drafts[1][name], weight, atol=1e-5, rtol=0)


@pytest.mark.slow  # imports DeepSpeed
def test_it_says_once_that_deepspeed_compiles_and_with_what(tmp_path, monkeypatch, capsys):
    """Only the main process, and only where the operation is not compiled yet."""
    engine = pytest.importorskip("eagle.train.engine_deepspeed")
    if engine.get_accelerator().device_name() != "cpu":
        pytest.skip("compiles nothing with this accelerator")
    folder = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setenv("CXX", "g++")
    capsys.readouterr()  # what DeepSpeed says when it is imported
    engine.check_compiler(main=False)
    assert not capsys.readouterr().out
    engine.check_compiler(main=True)
    (line,) = capsys.readouterr().out.splitlines()
    operation = re.fullmatch(
        rf"DeepSpeed compiles (\w+) with g\+\+, once on a machine, into {re.escape(str(folder))}: "
        "this takes one to three minutes without further output", line,
    )  # fmt: skip
    assert operation is not None, line
    compiled = folder / "py3_cpu" / operation[1] / f"{operation[1]}.so"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    engine.check_compiler(main=True)
    assert not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "told"), [("c++", "finds no C++ compiler: c++"), ("ninja", "finds no ninja")])
def test_without_a_compiler_there_is_one_line(command, tmp_path, tool, told):
    """A PATH with everything but that."""
    (tmp_path / "bin").mkdir()
    for folder in [*os.environ["PATH"].split(os.pathsep), str(Path(sys.executable).parent)]:
        for program in Path(folder).glob("*"):
            place = tmp_path / "bin" / program.name
            if program.name != tool and not place.exists():
                place.symlink_to(program)
    done = subprocess.run(command(1, "ck"), cwd=SCRIPT.parent, env={**environment(), "PATH": str(tmp_path / "bin")},
                          capture_output=True, text=True, check=False, timeout=300)  # fmt: skip
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "error: DeepSpeed" in line]
    assert done.returncode != 0 and len(lines) == 1 and told in lines[0]


@pytest.mark.slow
def test_a_state_that_would_run_code_is_refused(command, tmp_path):
    """DeepSpeed itself would run it."""
    launch(command(1, "parts", "--max-steps", "2"))
    (state,) = (tmp_path / "parts").glob("step-*/state/state/*optim_states.pt")
    torch.save({**torch.load(state, weights_only=False), "more": MakesFolder(tmp_path / "ran")}, state)
    done = subprocess.run(command(1, "parts", "--resume"), cwd=SCRIPT.parent, env=environment(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode != 0 and "checkpoint is damaged" in done.stderr + done.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_two_processes_killed_and_resumed_give_the_same_losses(command, tmp_path):
    """SIGKILL to launcher and workers at once, as a machine that goes away."""
    settings = {"epochs": 48, "save_every": 3, "log_every": 4}  # of one step each
    launch(command(2, "whole", **settings))
    process = subprocess.Popen(command(2, "killed", **settings), cwd=SCRIPT.parent,
                               env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    deadline = time.time() + 900
    while not (tmp_path / "killed" / "latest").exists() and time.time() < deadline:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "final").exists(), "it ended before it was killed"
    resumed = re.search(r"resumed after step (\d+)", launch(command(2, "killed", "--resume", **settings)))
    assert 0 < int(resumed.group(1)) < 48 and int(resumed.group(1)) % 3 == 0
    assert [step for step, _ in curve(tmp_path / "killed")] == list(range(4, 49, 4))
    assert_same_curve(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.by_hand
def test_two_processes_train_online_as_on_stored_states(tmp_path):
    """Each with its own base model; stopped and resumed, by the rows that both found together."""
    case = Case("llava", tmp_path)
    case.allocate()
    assert "x 2 processes" in launch([*launched(2), *case.command("stored", *case.stored)])
    out = launch([*launched(2), *case.command("online", *case.online, "--max-steps", "2")])
    assert "records, skipped: 1 missing_picture" in out and "10 records, skipped: 1 empty" in out
    again = launch([*launched(2), *case.command("online", *case.online, "--resume")])
    assert "resumed after step 2" in again and "skipped" not in again
    assert case.curve("online") == pytest.approx(case.curve("stored"), abs=1e-4)
    assert len(case.curve("online")) == 4
    for one, other in zip(case.history("stored")["validations"], case.history("online")["validations"], strict=True):
        for kind in ("text", "image"):
            assert other["results"][kind]["loss"] == pytest.approx(one["results"][kind]["loss"], abs=1e-4)


@pytest.mark.by_hand
def test_two_processes_train_the_same_while_the_main_one_answers(tmp_path):
    case = Case("llava", tmp_path)
    case.allocate()
    (tmp_path / "q.jsonl").write_text('{"question": "Name a river."}\n')
    evaluate = ["--eval-data", str(tmp_path / "q.jsonl"), "--eval-every", "1", "--eval-length", "8"]
    launch([*launched(2), *case.command("without", *case.stored)])
    out = launch([*launched(2), *case.command("with", *case.stored, *evaluate)])
    history = case.history("with")
    assert [row["step"] for row in history["served"]] == [row["step"] for row in history["steps"]] == [1, 2, 3, 4]
    assert out.count(": decoding 1 questions: tau ") == 4
    assert case.curve("with") == case.curve("without")

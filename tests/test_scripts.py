"""What the numbered scripts pass on: every environment variable reaches the command that it is for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from fault_support import hear_ctrl_c

from llava.files import write_json

REPO = Path(__file__).resolve().parents[1]
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$RECORD"
"""


@pytest.fixture
def commands(tmp_path: Path):
    """Runs a script with recorders in the place of python and deepspeed; gives the command lines."""
    for name in ("python", "deepspeed"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)

    def run(script: str, *flags: str, **settings: str) -> list[str]:
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment = {**kept, "PYTHON": str(tmp_path / "python"), "RECORD": str(record), "WORK": "w", **settings}
        subprocess.run(["bash", str(REPO / "scripts" / script), *flags], env=environment, check=True, timeout=120)
        return record.read_text().splitlines()

    return run


def test_allocation_by_default(commands) -> None:
    text, image = commands("3_allocate.sh")
    assert text.endswith("--image_data_path pocket/data --json_data_path w/text.json")
    assert "--outdir w/hidden_v --model_type llava_v15_v" in image and image.endswith("--json_data_path w/image.json")


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"HIDDEN_DTYPE": "int8", "FEATURE_LAYERS": "2,18"}, "--hidden-dtype int8 --feature-layers 2,18"),
        (
            {"MAX_LENGTH": "4096", "SHARD": "1/8", "SHARD_SIZE": "32"},
            "--max-length 4096 --shard 1/8 --shard-size 32",
        ),
        ({"REGENERATE": "1"}, "--regenerate"),
        ({"REGENERATE": "0", "DRAFT": "d"}, ""),
        (
            {"REGENERATE": "1", "DRAFT": "owner/a draft", "TEMPERATURE": "0.7", "MAX_NEW_TOKENS": "64"},
            "--regenerate --msd-model owner/a draft --temperature 0.7 --max-new-tokens 64",
        ),
    ],
)
def test_allocation_with_settings(commands, settings: dict[str, str], flags: str) -> None:
    for line in commands("3_allocate.sh", "--seed", "7", **settings):
        assert line.split(".json ")[-1] == f"{flags} --seed 7".strip()


def test_flags_of_the_allocation_exist() -> None:
    from eagle.ge_data.allocation import parser

    known = {option for action in parser()._actions for option in action.option_strings}
    script = (REPO / "scripts" / "3_allocate.sh").read_text().split("set -euo")[1]
    used = {word.strip('("}') for word in script.replace("+", " ").split() if word.strip("(").startswith("--")}
    assert len(used) > 12 and used <= known


def test_training_stored_and_online(commands) -> None:
    checked, stored = commands("4_train.sh", "--epochs", "2")
    assert "--tmpdir_v w/hidden_v --tmpdir_t w/hidden_t" in stored and stored.endswith("--resume --epochs 2")
    flags = stored.partition("main_deepspeed.py ")[2]
    assert checked == f"python -m eagle.train.main_deepspeed {flags} --check"
    _, online = commands("4_train.sh", ONLINE="1", PICTURES="p", COUNT="9")
    files = "--online --annotations_v w/image.json --annotations_t w/text.json --image-folder p --limit 9"
    assert files in online and "--tmpdir" not in online
    assert "--config pocket_llava_config.json" in stored and "--draft-kind" not in stored
    for base in ("Qwen/Qwen3-VL-4B-Instruct", "pocket/qwen2vl"):
        assert f"--basepath {base} --cpdir w/checkpoints --config auto" in commands("4_train.sh", BASE=base)[1]
    assert "--config c.json" in commands("4_train.sh", BASE="owner/base", CONFIG="c.json")[1]
    _, head = commands("4_train.sh", DRAFT_KIND="eagle3")
    assert "--config auto" in head and head.endswith("--resume --draft-kind eagle3")


def test_training_on_several_machines(commands, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The host file replaces the one machine; without it DeepSpeed would train on this one in silence."""
    hosts = tmp_path / "hosts"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        commands("4_train.sh", HOSTFILE=str(hosts))
    assert failed.value.returncode == 2 and capfd.readouterr().err == f"error: no such file: HOSTFILE={hosts}\n"
    hosts.write_text("a slots=8\nb slots=8\n")
    for devices, flags in ((None, ""), ("a:0,1@b", " --include a:0,1@b")):
        *_, line = commands("4_train.sh", HOSTFILE=str(hosts), **({"DEVICES": devices} if devices else {}))
        assert f"--master_port 29504 --hostfile {hosts}{flags} EAGLE/eagle" in line
    *_, line = commands("4_train.sh")
    assert "--master_port 29504 --include localhost:0 EAGLE/eagle" in line and "--hostfile" not in line


def test_training_without_deepspeed_is_one_line(
    commands, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deepspeed").unlink()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        commands("4_train.sh")
    assert failed.value.returncode == 2
    assert capfd.readouterr().err.startswith("error: deepspeed is not installed for ")


@pytest.fixture
def real_python(tmp_path: Path, commands) -> None:
    """``python`` in the folder of the recorders is the real one, with the packages of this repository."""
    rooms = ":".join(str(REPO / room) for room in ("LLaVA", "EAGLE"))
    (tmp_path / "python").write_text(f'#!/bin/sh\nPYTHONPATH={rooms} exec {sys.executable} "$@"\n')


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--epcohs", "2"], "error: unknown flag --epcohs (did you mean --epochs?)"),
        (["--epochs", "0"], "error: epochs=0 (give at least 1)"),
        (["--config", "nothing.json"], "error: training config not found: nothing.json"),
    ],
)
def test_wrong_flags_of_training_are_one_line_without_the_launcher(
    commands, tmp_path: Path, real_python: None, capfd: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        commands("4_train.sh", *flags)
    assert failed.value.returncode == 2
    assert capfd.readouterr().err == f"{line}\n"
    assert not (tmp_path / "record").exists(), "the launcher was not started"


LAUNCHER = """#!{python}
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
open(os.environ["RECORD"], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("own", [False, True], ids=["CKPT", "--cpdir"])
@pytest.mark.parametrize("saved", [False, True])
def test_training_stopped_by_ctrl_c(commands, tmp_path: Path, real_python: None, saved: bool, own: bool) -> None:
    """The terminal tells the script and DeepSpeed's processes; the script has the last word. --cpdir wins over CKPT."""
    (tmp_path / "deepspeed").write_text(LAUNCHER.format(python=sys.executable))
    checkpoints, record = tmp_path / "checkpoints", tmp_path / "record"
    if saved:
        checkpoints.mkdir()
        (checkpoints / "latest").write_text("step-00000004\n")
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "RECORD": str(record),
                   "CKPT": str(tmp_path / "other" if own else checkpoints)}  # fmt: skip
    flags = [f"--cpdir={checkpoints}"] if own else []
    process = subprocess.Popen(
        ["bash", str(REPO / "scripts" / "4_train.sh"), *flags], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    resumed = f"stopped; the same command resumes from {checkpoints}/step-00000004\n"
    assert errors == (resumed if saved else "stopped before the first checkpoint; the same command starts again\n")
    assert process.returncode == 130


def test_training_that_fails_keeps_its_status(commands, tmp_path: Path) -> None:
    (tmp_path / "deepspeed").write_text("#!/usr/bin/env bash\nexit 3\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        commands("4_train.sh")
    assert failed.value.returncode == 3


@pytest.mark.parametrize("script", sorted(path.name for path in (REPO / "scripts").glob("*.sh")))
def test_help_is_the_comment_at_the_top(script: str) -> None:
    command = ["bash", str(REPO / "scripts" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (
        done.stdout.startswith(f"Step {script[0]}: ")
        and f"scripts/{script}" in done.stdout
        and "set -" not in done.stdout
    )


@pytest.mark.parametrize(
    ("tasks", "asks"),
    [("", True), ("chartqa_msd", True), ("mme,chartqa_msd", True), ("mme", False), ("xchartqa", False)],
)
def test_embedded_models_get_the_embedded_questions(commands, tmp_path: Path, tasks: str, asks: bool) -> None:
    """ChartQA's and ours of it: without them lmms-eval would ask the hub."""
    (tmp_path / "data").mkdir()
    lines = commands("5_evaluate.sh", OUT=str(tmp_path), TASKS=tasks)
    written = f"python -m lmms_eval_msd.offline --jsonl pocket/data/heldout.jsonl --out {tmp_path}/data"
    assert (written in lines) == asks
    base, msd, compared = lines[-3:]
    for line in (base, msd):
        assert f"--tasks {tasks or 'chartqa'} " in line and f"pretrained={REPO}/pocket/llava " in line
    assert "--use_msd" not in base and f"--use_msd --msd_model_path {REPO}/pocket/llava-msd" in msd
    assert "lmms_eval_msd.compare" in compared


def test_file_names_of_step_5_are_in_utc(commands, tmp_path: Path) -> None:
    """Those of the script and those of lmms-eval below them, whose default is another zone."""
    (tmp_path / "data").mkdir()
    before = datetime.now(timezone.utc).replace(microsecond=0)
    base, msd, _ = commands("5_evaluate.sh", OUT=str(tmp_path), TASKS="mme", OTHER="", TZ="Asia/Tokyo")
    stamp = base.split("--output_path ")[1].split("/")[-2]
    assert before <= datetime.strptime(f"{stamp}+0000", "%Y%m%d_%H%M%S%z") <= datetime.now(timezone.utc)
    assert "--timezone UTC" in base and "--timezone UTC" in msd


def test_questions_for_other_models_are_those_given(commands, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    flags = ("owner/base", "owner/draft", "chartqa_msd")
    assert not any("offline" in line for line in commands("5_evaluate.sh", *flags, OUT=str(tmp_path)))
    first = commands("5_evaluate.sh", *flags, OUT=str(tmp_path), QUESTIONS="q.jsonl")[0]
    assert "lmms_eval_msd.offline --jsonl q.jsonl" in first


@pytest.mark.parametrize(
    ("made", "used", "told"),
    [
        (["latest", "final"], "final", "final (of step 4)"),
        (["final"], "final", "final (of step 4)"),
        (
            ["final", "latest"],
            "step-00000004",
            "step-00000004 (newest checkpoint of step 4, whose training has not ended)",
        ),
        (["latest"], "step-00000004", "step-00000004 (newest checkpoint of step 4, whose training has not ended)"),
        ([], None, "pocket/llava-msd (shipped; step 4 has made none in "),
    ],
    ids=["finished", "copied", "resumed", "killed", "none"],
)
@pytest.mark.parametrize("base", ["pocket/llava", "owner/base"])
def test_step_5_takes_the_newest_draft_of_step_4(
    commands, tmp_path: Path, made: list[str], used: str | None, told: str, base: str, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "work" / "checkpoints"
    (checkpoints / "step-00000004").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for age, name in enumerate(made):
        (checkpoints / name).mkdir() if name == "final" else (checkpoints / name).write_text("step-00000004\n")
        os.utime(checkpoints / name, (1000 + age, 1000 + age))
    settings = {"WORK": str(tmp_path / "work"), "OUT": str(tmp_path), "BASE": base}
    if used is None and base != "pocket/llava":
        with pytest.raises(subprocess.CalledProcessError) as failed:
            commands("5_evaluate.sh", **settings)
        assert failed.value.returncode == 2
        return
    lines = commands("5_evaluate.sh", **settings)
    drafts = [line.split("--msd_model_path ")[1].split()[0] for line in lines if "--use_msd" in line]
    shipped = [str(REPO / "pocket/llava-msd")] if base == "pocket/llava" else []
    assert drafts == ([str(checkpoints / used)] if used else []) + shipped
    assert f"{told}\n" in capfd.readouterr().out or used is None
    folders = lines[-1].split(" --msd ")[1].split(" --out ")[0].split()
    assert [Path(folder).name for folder in folders] == ["msd", "other"][: len(drafts)]
    assert len(commands("5_evaluate.sh", OTHER="", **settings)) == len(lines) - (len(drafts) - 1)
    assert ("The pocket models answer in whole sentences" in capfd.readouterr().out) == (base == "pocket/llava")


@pytest.mark.parametrize(("step", "told"), [(40, " (trained for 40 of 690 steps)"), (690, "")])
def test_step_5_says_how_far_the_draft_was_trained(
    commands, tmp_path: Path, step: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "draft" / "provenance.json", {"settings": {"step": 1}, "total_steps": 690, "step": step})
    commands("5_evaluate.sh", OUT=str(tmp_path), DRAFT=str(tmp_path / "draft"))
    assert f"draft:      {tmp_path}/draft{told}\n" in capfd.readouterr().out


def test_a_draft_alone_is_for_the_pocket_model(commands, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    msd = commands("5_evaluate.sh", OUT=str(tmp_path), DRAFT="owner/draft")[-2]
    assert f"pretrained={REPO}/pocket/llava " in msd and "--msd_model_path owner/draft" in msd


def test_a_second_draft_is_evaluated_too(commands, tmp_path: Path) -> None:
    flags = {"BASE": "owner/base", "DRAFT": "owner/draft", "OTHER": "owner/second", "TASKS": "mme"}
    base, msd, other, compared = commands("5_evaluate.sh", OUT=str(tmp_path), **flags)
    assert "--msd_baseline" not in base and all("--msd_baseline measure" in line for line in (msd, other))
    assert "--msd_model_path owner/draft" in msd and "--msd_model_path owner/second" in other
    assert " --msd " in compared and "/msd " in compared and "/other " in compared

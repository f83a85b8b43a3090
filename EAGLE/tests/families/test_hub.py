"""Base and draft by their hub names, from a loopback server that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, HubServer
from safetensors.torch import load_file
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian, make_llava_hf
from tiny_stock import make_qwen

from eagle.families import load_target

BASES = {"tiny/llava-bin": make_liuhaotian, "tiny/llava-hf": make_llava_hf, "tiny/qwen": make_qwen}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repositories")
    for name, make in BASES.items():
        make(root / name)
        make_draft(root / f"{name}-msd", load_target(root / name, dtype="float32"))
    config = root / "tiny/llava-bin/config.json"  # the published one names its vision tower by a hub name
    config.write_text(json.dumps({**json.loads(config.read_text()), "mm_vision_tower": "tiny/tiny-clip"}))
    draft = root / "tiny/llava-bin-msd"
    torch.save(load_file(draft / "model.safetensors"), draft / "pytorch_model.bin")  # as most published drafts
    (draft / "model.safetensors").unlink()
    make_image(root / "picture.png")
    return root


@pytest.fixture
def hub(repositories: Path) -> Iterator[HubServer]:
    with HubServer(repositories) as server:
        yield server


def generate(root: Path, base: str, draft: str, environment: dict[str, str], *more: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "eagle.cli", "generate", "--base-model", base, "--msd-model", draft, "--dtype", "float32",
        "--prompt", "Which colours?", "--image", str(root / "picture.png"), "--max-new-tokens", "12", "--json", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)


def answer_of(done: subprocess.CompletedProcess) -> dict[str, object]:
    """What was printed, without the time it took."""
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    assert report.pop("seconds")
    return report


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "tiny/llava-hf" else pytest.mark.by_hand) for name in BASES]
)
@pytest.mark.slow
def test_hub_names_work_like_folders(repositories: Path, hub: HubServer, tmp_path: Path, name: str) -> None:
    folders = str(repositories / name), str(repositories / f"{name}-msd")
    local = answer_of(generate(repositories, *folders, hub.environment(tmp_path / "local")))
    remote = answer_of(generate(repositories, name, f"{name}-msd", hub.environment(tmp_path)))
    assert remote == local
    assert any(path.endswith("-msd/resolve/" + COMMIT + "/config.json") for _, path in hub.requests) or any(
        path.endswith("-msd/resolve/main/config.json") for _, path in hub.requests
    )

    before = len(hub.requests)
    offline = generate(repositories, name, f"{name}-msd", {**hub.environment(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert answer_of(offline) == local
    assert len(hub.requests) == before
    code = "import sys; from eagle.families.base_weights import load_base_tensors\n"
    code += "for name in sys.argv[1:]: print(*load_base_tensors(name).head.shape)"
    line = [sys.executable, "-c", code, folders[0], name, "tiny/unknown"]
    environment = {**os.environ, **hub.environment(tmp_path), "HF_HUB_OFFLINE": "1"}
    read = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600, check=False)
    here, cached = read.stdout.splitlines()
    assert here == cached != "", read.stderr
    assert "the hub did not give it" in read.stderr


@pytest.mark.slow
def test_a_draft_is_exported_by_its_hub_name(repositories: Path, hub: HubServer, tmp_path: Path) -> None:
    environment, base, written = {**os.environ, **hub.environment(tmp_path / "home")}, "tiny/llava-hf", []
    for number, root in enumerate(("", f"{repositories}/")):
        out = tmp_path / str(number)
        line = [sys.executable, "-m", "eagle.cli", "export", "--to", "vllm", "--out", str(out)]
        line += ["--msd-model", f"{root}{base}-msd", "--base-model", f"{root}{base}"]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        written.append(load_file(out / "model.safetensors"))
    assert written[0].keys() == written[1].keys() and len(written[0]) > 5
    assert all(torch.equal(each, written[1][name]) for name, each in written[0].items())
    assert any(f"/{base}-msd/resolve/" in path for _, path in hub.requests)


@pytest.mark.slow
@pytest.mark.parametrize(
    "load",
    [
        "from eagle.drafts.checkpoint import load_draft as load",
        "from eagle.families.base_weights import load_base_tensors as load",
    ],
)
def test_only_one_kind_of_weights_is_downloaded(repositories: Path, hub: HubServer, tmp_path: Path, load: str) -> None:
    """Of a repository with both kinds, the .bin is not asked for."""
    name = "tiny/llava-hf-msd" if "draft" in load else "tiny/llava-hf"
    other = repositories / name / "pytorch_model.bin"
    torch.save(load_file(repositories / name / "model.safetensors"), other)
    line = [sys.executable, "-c", f"{load}; load({name!r})"]
    environment = {**os.environ, **hub.environment(tmp_path)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600, check=False)
    other.unlink()
    assert done.returncode == 0, done.stderr
    fetched = {Path(path).name for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("base", "draft", "more"),
    [
        ("tiny/absent", "tiny/llava-hf-msd", ()),
        ("tiny/llava-hf", "tiny/absent", ()),
        ("tiny/llava-hf", "tiny/llava-hf-msd", ("--revision", "v9")),
        ("tiny/llava-hf", "tiny/qwen-msd", ()),
    ],
)
@pytest.mark.slow
def test_what_the_hub_lacks_is_one_clear_line(
    repositories: Path, hub: HubServer, tmp_path: Path, base: str, draft: str, more: tuple[str, ...]
) -> None:
    done = generate(repositories, base, draft, hub.environment(tmp_path), *more)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr

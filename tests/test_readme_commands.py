"""Every command of README is run: its shell blocks and its Python, on the pocket models and with small settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
SHORT = "--limit 1 --max-new-tokens 8 --dtype float32"
TINY_TRAINING = "--epochs 1 --validation-limit 2 --tracker none"


RUN = {
    ".venv/bin/python -m eagle.ge_data.download": "--check || test $? = 1",  # 1: pictures are missing
    "msd generate": "--max-new-tokens 8",
    "msd verify": SHORT,
    "msd bench": f"{SHORT} --warm-up 0",
    "msd export": "",
    "export BASE=": "",
    "TEXT=": "",
    "PICTURES=": "--max-length 160",
    "scripts/4_train.sh": TINY_TRAINING,
    "DRAFT=": "",
}
"""The lines that are run: how they begin, and what is added to make them small."""
NOT_RUN = ("make ", "scripts/1_setup.sh", "msd serve")
"""They make an environment: CI runs the same. `msd serve` needs vLLM: tests/serving runs it."""

POCKET = REPO / "pocket"
STANDS_FOR = {
    "BASE=liuhaotian/llava-v1.5-7b": f"BASE={POCKET}/llava",
    "llava_v15_7B_config.json": "pocket_llava_config.json",
    "WORK=outputs/llava-7b": "WORK=$TMP/work",
    "--out outputs/vllm-draft": "--out $TMP/vllm-draft",
    "COUNT=68000": "COUNT=6",
    "image_data/annotations/ShareGPT_V3_unfiltered_cleaned_split.json": f"{POCKET}/data/train_t.json",
    "image_data/annotations/llava_v1_5_mix665k.json": f"{POCKET}/data/train_v.json",
    "PICTURES=image_data": f"PICTURES={POCKET}/data",
    "--root image_data": "--root $TMP/image_data",
    ".venv/bin/python": "python",
}
"""What README's names are on a machine without the real models, in this order."""


def blocks() -> list[list[str]]:
    """README's shell blocks: their lines, continued ones joined, without comments."""
    found = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [
        [bare for line in block.replace("\\\n", " ").splitlines() if (bare := re.sub(r"\s+#.*", "", line).strip())]
        for block in found
    ]


LINES = sorted({line for block in blocks() for line in block})


def on_pocket(line: str) -> str | None:
    """The line as it is run here; None if it is not run."""
    if line.startswith(NOT_RUN):
        return None
    (added,) = [added for start, added in RUN.items() if line.startswith(start)]
    for name, stand_in in STANDS_FOR.items():
        line = line.replace(name, stand_in)
    return f"{line} {added}".strip()


def test_every_line_is_run_and_nothing_else_is_listed() -> None:
    unknown = [line for line in LINES if not line.startswith((*RUN, *NOT_RUN))]
    assert unknown == [], "README has commands that no test runs"
    assert [start for start in (*RUN, *NOT_RUN) if not any(line.startswith(start) for line in LINES)] == []
    assert [name for name in STANDS_FOR if name not in "\n".join(LINES)] == []


def programs(folder: Path) -> Path:
    """`msd`, `python` and `deepspeed` as an installation has them, of the environment that runs this test."""
    folder.mkdir()
    start = {"msd": "-m eagle.cli", "python": "", "deepspeed": "-m deepspeed.launcher.runner"}
    for name, module in start.items():
        (folder / name).write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" {module} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def bash(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in the repository, without a network; $TMP is a folder of its own."""
    packages = os.pathsep.join(str(REPO / name) for name in ("LLaVA", "EAGLE", "lmms-eval", "."))
    env = os.environ | {"PYTHONPATH": packages, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "TMP": str(tmp_path)}
    env |= {"PATH": f"{programs(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"OUT": str(tmp_path / "out"), "LIMIT": "1", "MODEL_ARGS": "dtype=float32", "PORT": "29641"}
    env |= {"QUESTIONS": str(POCKET / "data" / "heldout.jsonl")}
    env |= {"GEN_KWARGS": "temperature=0,max_new_tokens=8", "HF_HOME": str(tmp_path / "hf")}
    return subprocess.run(
        ["bash", "-euxc", script], env=env, cwd=REPO, capture_output=True, text=True, timeout=1800, check=False
    )


RUNS = [lines for block in blocks() if (lines := [run for line in block if (run := on_pocket(line))])]


@pytest.mark.slow
@pytest.mark.parametrize("lines", RUNS, ids=range(len(RUNS)))
def test_block_runs(lines: list[str], tmp_path: Path) -> None:
    """Line after line, in one shell, as a reader pastes it."""
    done = bash("\n".join(lines), tmp_path)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    made = {path.parent.name for path in tmp_path.rglob("model.safetensors")}
    assert not any("_train" in line or "deepspeed" in line for line in lines) or "final" in made


def test_the_picture_is_one_that_the_models_have_not_seen() -> None:
    (picture,) = re.findall(r'"(\S+\.png)"', README)
    assert f"--image {picture} " in README
    with (REPO / "pocket" / "data" / "heldout.jsonl").open(encoding="utf-8") as file:
        held_out = {f"pocket/data/{name}" for line in file for name in json.loads(line)["images"]}
    assert picture in held_out and (REPO / picture).is_file()


def test_the_python_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """README's lines as they are: the answer is the plain one, in fewer passes."""
    monkeypatch.chdir(REPO)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 8
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    text = capsys.readouterr().out
    msd, inputs, out = names["msd"], names["inputs"], names["out"]
    plain = msd.generate(**inputs, max_new_tokens=256, temperature=0.0, use_msd=False)
    length = inputs["input_ids"].shape[1]
    assert text.split()[-1] == str(out.stats.tau) and out.stats.tau > 2
    answer = msd.tokenizer.decode(plain.sequences[0, length:], skip_special_tokens=True)
    assert len(answer) > 40 and (text.startswith(answer) or "float32" not in str(msd.dtype))

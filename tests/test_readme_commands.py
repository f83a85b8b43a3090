"""Every command of README is run: its shell blocks and its Python, on the pocket models and with small settings.

A line of a shell block that no rule below knows fails `test_every_line_has_a_rule`, which names it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
PICTURE = REPO / "pocket" / "data" / "images" / "heldout" / "h0000.png"
SHORT = "--limit 1 --max-new-tokens 8 --dtype float32"
TINY_TRAINING = "--epochs 1 --validation-limit 2 --tracker none"


class Rule(NamedTuple):
    """What a line that begins so is tested by. ``add``: it is run, with this after it. ``by``: the test that runs the
    same command, or that compares it with what CI runs."""

    start: str
    add: str | None = None
    by: str | None = None


HERE = "tests/test_readme_commands.py"
RULES = (
    Rule("make demo", by=f"{HERE}::test_make_targets_do_what_the_readme_says"),
    Rule("make bench", by=f"{HERE}::test_make_targets_do_what_the_readme_says"),
    Rule("make test", by=f"{HERE}::test_make_targets_do_what_the_readme_says"),
    Rule("pip install", by=f"{HERE}::test_installation_is_that_of_ci"),
    Rule("scripts/1_setup.sh", by=f"{HERE}::test_installation_is_that_of_ci"),
    Rule(".venv/bin/python -m eagle.ge_data.download", add="--check || test $? = 1"),  # 1: pictures are missing
    Rule("msd demo", add="--pictures 1 --max-new-tokens 8 --dtype float32"),
    Rule("msd generate", add="--max-new-tokens 8"),
    Rule("msd verify", add=SHORT),
    Rule("msd bench", add=f"{SHORT} --warm-up 0"),
    Rule("export BASE=", add=""),
    Rule("TEXT=", add=""),
    Rule("PICTURES=", add="--max-length 160"),
    Rule("scripts/4_train.sh", add=TINY_TRAINING),
    Rule("DRAFT=", add=""),
    Rule("python -m eagle.ge_data.convert", add=""),
    Rule("python -m eagle.ge_data.allocation", add="--limit 6 --max-length 160"),
    Rule("cd EAGLE/eagle/train", add=""),
    Rule("deepspeed ", add=TINY_TRAINING),
    Rule("accelerate launch", by="lmms-eval/tests/test_end_to_end.py::test_command_of_the_readme"),
)

POCKET = REPO / "pocket"
STANDS_FOR = {
    "picture.png": str(PICTURE),
    "BASE=liuhaotian/llava-v1.5-7b": f"BASE={POCKET}/llava",
    "llava_v15_7B_config.json": "pocket_llava_config.json",
    "WORK=outputs/llava-7b": "WORK=$TMP/work",
    "COUNT=68000": "COUNT=6",
    "image_data/annotations/ShareGPT_V3_unfiltered_cleaned_split.json": f"{POCKET}/data/train_t.json",
    "image_data/annotations/llava_v1_5_mix665k.json": f"{POCKET}/data/train_v.json",
    "--input llava_v1_5_mix665k.json": f"--input {POCKET}/data/train_v.json",
    "llava_v1_5_mix665k_fixed.json": "$TMP/image.json",
    "PICTURES=image_data": f"PICTURES={POCKET}/data",
    "--image_data_path image_data": f"--image_data_path {POCKET}/data",
    "--root image_data": "--root $TMP/image_data",
    "--outdir DV": "--outdir $TMP/DV",
    "--tmpdir_v DV": "--tmpdir_v $TMP/DV",
    " --tmpdir_t DT": "",  # the block makes the states of pictures alone
    "--model BASE": f"--model {POCKET}/llava",
    "--basepath BASE": f"--basepath {POCKET}/llava",
    "--cpdir CKPT": "--cpdir $TMP/CKPT",
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


def rules_of(line: str) -> list[Rule]:
    return [rule for rule in RULES if line.startswith(rule.start)]


def on_pocket(line: str) -> str | None:
    """The line as it is run here; None where another test runs it."""
    (rule,) = rules_of(line)
    if rule.add is None:
        return None
    for name, stand_in in STANDS_FOR.items():
        line = line.replace(name, stand_in)
    return f"{line} {rule.add}".strip()


@pytest.mark.parametrize("line", LINES)
def test_every_line_has_a_rule(line: str) -> None:
    found = rules_of(line)
    assert len(found) == 1, f"README has a command that no test runs, or two: {line}"
    if found[0].by is not None:
        file, _, name = found[0].by.partition("::")
        assert re.search(rf"^def {name}\(", (REPO / file).read_text(encoding="utf-8"), re.MULTILINE), found[0].by


def test_every_rule_and_stand_in_is_needed() -> None:
    assert [rule.start for rule in RULES if not any(line.startswith(rule.start) for line in LINES)] == []
    whole = "\n".join(LINES)
    assert [name for name in STANDS_FOR if name not in whole] == []


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


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks())))
def test_block_runs(number: int, tmp_path: Path) -> None:
    """Line after line, in one shell, as a reader pastes it."""
    lines = [run for line in blocks()[number] if (run := on_pocket(line))]
    if not lines:
        return  # make, and what other tests run
    done = bash("\n".join(lines), tmp_path)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    made = {path.parent.name for path in tmp_path.rglob("model.safetensors")}
    assert not any("_train" in line or "deepspeed" in line for line in lines) or "final" in made


def test_the_python_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """README's lines as they are, on a held-out picture: the answer is the plain one, in fewer passes."""
    monkeypatch.chdir(REPO)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 8
    names: dict = {}
    exec(compile(code.replace("picture.png", str(PICTURE)), "README.md", "exec"), names)
    text = capsys.readouterr().out
    msd, inputs, out = names["msd"], names["inputs"], names["out"]
    plain = msd.generate(**inputs, max_new_tokens=256, temperature=0.0, use_msd=False)
    length = inputs["input_ids"].shape[1]
    assert text.split()[-1] == str(out.stats.tau) and out.stats.tau > 2
    answer = msd.tokenizer.decode(plain.sequences[0, length:], skip_special_tokens=True)
    assert len(answer) > 40 and (text.startswith(answer) or "float32" not in str(msd.dtype))


def test_make_targets_do_what_the_readme_says() -> None:
    """CI runs `make setup` and `make test`; `make demo` is the same set-up and `msd demo`, which is run above."""
    recipes = dict(re.findall(r"^(\w+): \$\(STAMP\).*\n\t(.+)$", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert recipes["demo"] == "$(BIN)/msd demo"
    assert "-m pytest $(PYTEST)" in recipes["test"]
    assert recipes["bench"].startswith(
        "$(BIN)/python -m benchmarks.suite "
    )  # tests/test_benchmarks.py runs a small one
    assert 'make test VENV="$work/venv"' in (REPO / ".ci" / "run").read_text()
    assert "bash scripts/1_setup.sh" in (REPO / "Makefile").read_text()


def test_installation_is_that_of_ci() -> None:
    """`.ci/run` installs by hand as README says, then with `make setup`, which runs scripts/1_setup.sh."""
    wanted = [shlex.split(line)[1:] for line in LINES if line.startswith("pip install")]
    done = re.findall(r'^"\$work/venv/bin/pip" (install .+)$', (REPO / ".ci" / "run").read_text(), re.MULTILINE)
    assert sorted(wanted) == sorted(shlex.split(line.replace(" -q", "")) for line in done)
    setup = (REPO / "scripts" / "1_setup.sh").read_text()
    assert all(folder in setup for _, _, folder in wanted) and "make setup" in (REPO / ".ci" / "run").read_text()


def test_the_launch_line_is_the_one_that_is_tested() -> None:
    """Every flag of README's `accelerate launch` is in the test that runs it, with the same value."""
    (line,) = [line for line in LINES if line.startswith("accelerate launch")]
    tested = (REPO / "lmms-eval" / "tests" / "test_end_to_end.py").read_text(encoding="utf-8")
    body = re.search(r"def test_command_of_the_readme\(.*?\n\n\n", tested, re.DOTALL)
    assert body is not None
    ours = {"BASE", "CKPT/final"}
    words = [word for word in shlex.split(line)[2:] if not any(name in word for name in ours)]
    assert [word for word in words if f'"{word}"' not in body[0]] == []

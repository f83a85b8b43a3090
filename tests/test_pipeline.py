"""The numbered scripts in sequence on the embedded models, with tiny settings: annotation files in, evaluation out.

Step 1, the set-up, is what made the environment that runs this.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
BASE = REPO / "pocket" / "llava"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    if not (BASE / "config.json").is_file():
        pytest.fail("pocket/llava is not here: a checkout of the repository has it")
    return tmp_path_factory.mktemp("pipeline")


def run(work: Path, script: str, *flags: str, **settings: str) -> str:
    """Runs one script; fails with its output if it does."""
    environment = os.environ | {"PYTHON": sys.executable, "WORK": str(work), "HF_HUB_OFFLINE": "1", **settings}
    environment["PYTHONPATH"] = os.pathsep.join(str(REPO / name) for name in ("LLaVA", "EAGLE", "lmms-eval"))
    done = subprocess.run(
        ["bash", str(REPO / "scripts" / script), *flags], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_five_steps(work):
    run(work, "2_convert.sh")
    assert all((work / name).is_file() for name in ("text.json", "image.json"))

    run(work, "3_allocate.sh", COUNT="12")
    run(work, "4_train.sh", "--epochs", "2", "--validation-limit", "2", PORT="29611")
    draft = work / "checkpoints" / "final"
    assert {"config.json", "model.safetensors"} <= {file.name for file in draft.iterdir()}

    picture = next((REPO / "pocket" / "data" / "images" / "heldout").iterdir())
    models = ["--base-model", str(BASE), "--msd-model", str(draft), "--dtype", "float32"]
    command = [sys.executable, "-m", "eagle.cli", "generate", *models, "--image", str(picture), "--json"]
    command += ["--prompt", "Describe the picture.", "--max-new-tokens", "16"]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO).stdout)
    assert answer["new_tokens"] <= 16

    out = work / "evaluation"
    questions = str(REPO / "pocket" / "data" / "heldout.jsonl")
    run(
        work, "5_evaluate.sh", str(BASE), str(draft), "chartqa",
        LIMIT="3", OUT=str(out), QUESTIONS=questions, MODEL_ARGS="dtype=float32", PORT="29612",
    )  # fmt: skip
    comparison = json.loads(next(out.glob("*/compare.json")).read_text())
    task = comparison["tasks"]["chartqa"]
    assert task["answers"] == task["answers_equal"] == 3
    assert all(score["base"] == score["msd"] for score in task["metrics"].values())

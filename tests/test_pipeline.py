"""The numbered scripts in sequence on the embedded models, with tiny settings: annotation files in, evaluation out.

Step 1, the set-up, is what made the environment that runs this.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eagle.hidden_states.index import load_index

REPO = Path(__file__).resolve().parents[1]
QWEN = {"FAMILY": "qwen2_vl", "BASE": "pocket/qwen2vl", "CONFIG": "pocket_qwen2vl_config.json"}
LLAVA = {"BASE": "pocket/llava"}  # and the scripts' own defaults


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "pipeline"


def run(work: Path, script: str, *flags: str, **settings: str) -> str:
    """Runs one script; fails with its output if it does."""
    environment = os.environ | {"PYTHON": sys.executable, "WORK": str(work), "HF_HUB_OFFLINE": "1", **settings}
    environment["PYTHONPATH"] = os.pathsep.join(str(REPO / name) for name in ("LLaVA", "EAGLE", "lmms-eval"))
    done = subprocess.run(
        ["bash", str(REPO / "scripts" / script), *flags], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def make_draft(work: Path, count: int, epochs: int, **settings: str) -> Path:
    """Steps 2 to 4, with ``count`` rows of each kind; the draft's folder."""
    run(work, "2_convert.sh")
    assert all((work / name).is_file() for name in ("text.json", "image.json"))

    run(work, "3_allocate.sh", COUNT=str(count), **settings)
    for kind in "tv":
        index = load_index(work / f"hidden_{kind}")
        assert index.samples == count and index.model == Path(settings["BASE"]).name
        assert index.family == settings.get("FAMILY", "llava")
        assert (index.image_tokens > 0) == (kind == "v") and all(shard.sha256 for shard in index.shards)

    run(work, "4_train.sh", "--epochs", str(epochs), "--validation-limit", "2", PORT="29611", **settings)
    draft = work / "checkpoints" / "final"
    assert {"config.json", "model.safetensors"} <= {file.name for file in draft.iterdir()}
    return draft


def check_answer(base: Path, draft: Path) -> None:
    """The draft decodes with its base."""
    picture = next((REPO / "pocket" / "data" / "images" / "heldout").iterdir())
    models = ["--base-model", str(base), "--msd-model", str(draft), "--dtype", "float32"]
    command = [sys.executable, "-m", "eagle.cli", "generate", *models, "--image", str(picture), "--json"]
    command += ["--prompt", "Describe the picture.", "--max-new-tokens", "16"]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO).stdout)
    assert answer["new_tokens"] <= 16


@pytest.mark.parametrize(
    ("settings", "model"), [(LLAVA, "llava_msd"), pytest.param(QWEN, "qwen2_vl_msd", marks=pytest.mark.by_hand)]
)
@pytest.mark.slow
def test_five_steps(work: Path, settings: dict[str, str], model: str) -> None:
    draft, base = make_draft(work, count=12, epochs=2, **settings), REPO / settings["BASE"]
    check_answer(base, draft)
    out = work / "evaluation"
    questions = str(REPO / "pocket" / "data" / "heldout.jsonl")
    run(
        work, "5_evaluate.sh", str(base), str(draft), "chartqa",
        LIMIT="3", OUT=str(out), QUESTIONS=questions, MODEL=model, MODEL_ARGS="dtype=float32", PORT="29612",
    )  # fmt: skip
    comparison = json.loads(next(out.glob("*/compare.json")).read_text())
    task = comparison["tasks"]["chartqa"]
    assert task["answers"] == task["answers_equal"] == 3
    assert all(score["base"] == score["msd"] for score in task["metrics"].values())


@pytest.mark.slow
def test_data_of_qwen_feed_training(work: Path) -> None:
    """Its two model types, from the documented commands to a draft that decodes."""
    check_answer(REPO / QWEN["BASE"], make_draft(work, count=6, epochs=1, **QWEN))

"""scripts/5_evaluate.sh: two evaluations in processes of their own, and their comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eval_support import read

REPO = Path(__file__).resolve().parents[2]
POCKET = REPO / "pocket"


def script(*arguments: str | Path, out: Path, questions: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """The script on some of ``questions``, without a network."""
    packages = os.pathsep.join(str(REPO / name) for name in ("LLaVA", "EAGLE", "lmms-eval"))
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "QUESTIONS": str(questions), "PYTHONPATH": packages}
    env |= {"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "PORT": "29508", "LIMIT": "2"}
    env |= {"COLUMNS": "200"} | settings  # a table whose headings stay in one line
    command = [str(REPO / "scripts" / "5_evaluate.sh"), *map(str, arguments)]
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=3600)


@pytest.mark.slow
def test_script(base, draft, questions, tmp_path):
    result = script(base, draft, out=tmp_path, questions=questions)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(read(tmp_path, "compare.json"))["tasks"]["chartqa"]["answers_equal"] == 2
    (report,) = [json.loads(path.read_text()) for path in tmp_path.rglob("msd/**/*_msd.json")]
    assert report["tasks"]["chartqa"]["speedup"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"), [("llava", "llava_msd"), pytest.param("qwen2vl", "qwen2_vl_msd", marks=pytest.mark.by_hand)]
)
def test_pocket_pairs_answer_as_the_base_alone(name, model, tmp_path):
    """Short and long answers of trained models: equal in float32, with equal scores, in fewer forward passes."""
    result = script(
        POCKET / name, POCKET / f"{name}-msd", "chartqa,chartqa_msd", out=tmp_path,
        questions=POCKET / "data" / "heldout.jsonl", MODEL=model, MODEL_ARGS="dtype=float32", LIMIT="4",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    comparison = json.loads(read(tmp_path, "compare.json"))
    assert comparison["dtype"] == "float32"
    assert comparison["tasks"].keys() == {"chartqa", "chartqa_msd"}
    for task, row in comparison["tasks"].items():
        assert (row["answers_equal"], row["answers"]) == (4, 4), task
        assert "relaxed_overall" in row["metrics"]
        assert all(score["base"] == score["msd"] for score in row["metrics"].values()), task
        assert row["tau"] > (2 if task == "chartqa_msd" else 1.5), task  # some short answers end in the first cycle
        assert row["speedup"] > 0
    (chart,) = tmp_path.rglob("compare.png")
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "equal answers" in result.stdout


@pytest.mark.slow
def test_script_that_fails(base, questions, tmp_path):
    """Half of it worked: that is no success."""
    result = script(base, tmp_path / "no-draft", out=tmp_path, questions=questions)
    assert result.returncode != 0, result.stdout + result.stderr
    assert "error: " in result.stderr
    assert "no-draft" in result.stderr
    assert list(tmp_path.rglob("compare.json")) == []

"""lmms-eval itself, in a process of its own, on its real task `chartqa` without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmms_eval_msd.offline import write_chartqa

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(questions, tmp_path_factory) -> Path:
    """A working directory in which `chartqa` finds its data set."""
    folder = tmp_path_factory.mktemp("run")
    write_chartqa(questions, folder)
    return folder


def run(data: Path, *command: str) -> subprocess.CompletedProcess[str]:
    packages = os.pathsep.join(str(REPO / name) for name in ("LLaVA", "EAGLE", "lmms-eval"))
    env = os.environ | {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "HF_HOME": str(data / "hf"), "COLUMNS": "200"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=data, env=env, text=True, capture_output=True, timeout=600
    )
    result.stdout += result.stderr
    return result


def read(folder: Path, ending: str) -> str:
    (path,) = folder.rglob(f"*{ending}")
    return path.read_text()


def test_real_task_gives_equal_answers(base, draft, data, monkeypatch):
    """lmms-eval's evaluator with its own `chartqa`, in this process: only that task is indexed, which is fast."""
    import lmms_eval.tasks
    from lmms_eval.evaluator import simple_evaluate

    monkeypatch.chdir(data)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", data / "cache")
    folder = str(Path(lmms_eval.tasks.__file__).parent / "chartqa")
    manager = lmms_eval.tasks.TaskManager(include_path=folder, include_defaults=False, model_name="llava_msd")
    answers, taus = [], []
    for flags in ("", f",use_msd=True,msd_model_path={draft},msd_depth=2,msd_top_k=3,msd_total_tokens=8"):
        results = simple_evaluate(
            model="llava_msd",
            model_args=f"pretrained={base},dtype=float32{flags}",
            tasks=["chartqa"],
            device="cpu",
            batch_size=1,
            task_manager=manager,
            gen_kwargs="temperature=0",
        )
        samples = results["samples"]["chartqa"]
        answers.append([(sample["doc_id"], sample["filtered_resps"]) for sample in samples])
        taus.append(results["throughput"]["avg_tau"])
        assert "relaxed_overall,none" in results["results"]["chartqa"]
        assert all(0 < sample["token_counts"][0]["output_tokens"] <= 16 for sample in samples)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3
    assert taus[0] == 1.0 < taus[1]


@pytest.mark.slow
def test_config_file_runs_base_and_msd(base, draft, data):
    common = {"model": "llava_msd", "tasks": "chartqa", "batch_size": 1, "gen_kwargs": "temperature=0"}
    common |= {"model_args": f"pretrained={base},msd_depth=2,msd_top_k=3,msd_total_tokens=8", "log_samples": True}
    flags = {"use_msd": True, "msd_model_path": str(draft)}
    configs = [common | {"output_path": str(data / "base")}, common | flags | {"output_path": str(data / "msd")}]
    (data / "run.yaml").write_text(yaml.safe_dump(configs))
    result = run(data, "lmms_eval", "--config", "run.yaml")
    assert result.returncode == 0, result.stdout
    assert "MSD decoding, float32" in result.stdout
    report = json.loads(read(data / "msd", "_msd.json"))
    assert report["use_msd"]
    assert report["tasks"]["chartqa"]["answers"] == 3
    assert report["tasks"]["chartqa"]["tokens"] <= 3 * 16  # the task's max_new_tokens
    saved = json.loads(read(data / "msd", "_results.json"))
    assert saved["msd"] == report
    assert saved["throughput"]["avg_tau"] == report["total"]["tau"]
    assert f"use_msd=True,msd_model_path={draft}" in saved["config"]["model_args"]

    from lmms_eval_msd.compare import main

    argv = ["--base", str(data / "base"), "--msd", str(data / "msd"), "--out", str(data / "out"), "--require-equal"]
    assert main(argv) == 0
    row = json.loads((data / "out" / "compare.json").read_text())["tasks"]["chartqa"]
    assert (row["answers_equal"], row["answers"]) == (3, 3)


@pytest.mark.slow
def test_command_of_the_readme(base, draft, data):
    out = data / "readme"
    launch = ["accelerate.commands.launch", "--num_processes=1", "--main_process_port=29506", "-m", "lmms_eval"]
    model = ["--model", "llava_msd", "--model_args", f"pretrained={base}", "--msd_model_path", str(draft), "--use_msd"]
    rest = ["--tasks", "chartqa", "--batch_size", "1", "--gen_kwargs", "temperature=0", "--limit", "2"]
    result = run(data, *launch, *model, *rest, "--output_path", str(out))
    assert result.returncode == 0, result.stdout
    report = json.loads(read(out, "_msd.json"))
    assert (report["use_msd"], report["processes"], report["total"]["answers"]) == (True, 1, 2)


@pytest.mark.slow
def test_two_processes_are_summed(base, draft, data):
    out = data / "two"
    launch = ["torch.distributed.run", "--nproc_per_node=2", "--master_port=29507"]  # accelerate wants MPI for this
    model = ["--model", "llava_msd", "--model_args", f"pretrained={base},use_msd=True,msd_model_path={draft}"]
    result = run(
        data, *launch, "-m", "lmms_eval", *model, "--tasks", "chartqa", "--log_samples", "--output_path", str(out)
    )
    assert result.returncode == 0, result.stdout
    report = json.loads(read(out, "_msd.json"))
    assert (report["processes"], report["total"]["answers"]) == (2, 3)


@pytest.mark.slow
def test_task_of_this_package(base, data):
    out = data / "long"
    model = ["lmms_eval", "--model", "llava_msd", "--model_args", f"pretrained={base}", "--tasks", "chartqa_msd"]
    result = run(data, *model, "--gen_kwargs", "max_new_tokens=20", "--limit", "1", "--output_path", str(out))
    assert result.returncode == 0, result.stdout
    assert json.loads(read(out, "_msd.json"))["tasks"]["chartqa_msd"]["tokens"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "llava_msd", "--model_args", "pretrained=none", "--tasks", "chartqa", "--use_msd"],
            "needs a draft",
        ),
        (["--model", "llava_hf", "--tasks", "chartqa", "--use_msd"], "does not work with --model llava_hf"),
        (["--model", "llava_msd", "--model_args", "pretrained=/none", "--tasks", "chartqa"], "not found"),
    ],
)
def test_errors_are_one_line(data, arguments, message):
    result = run(data, "lmms_eval", *arguments)
    assert result.returncode == 2, result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in result.stdout


@pytest.mark.slow
def test_failed_evaluation_fails(base, data):
    result = run(data, "lmms_eval", "--model", "llava_msd", "--model_args", f"pretrained={base}", "--tasks", "no_such")
    assert result.returncode == 1, result.stdout
    assert "no_such" in result.stdout


@pytest.mark.slow
def test_script(base, draft, questions, tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "QUESTIONS": str(questions), "LIMIT": "2"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PORT": "29508"}
    script = [str(REPO / "scripts" / "5_evaluate.sh"), str(base), str(draft)]
    result = subprocess.run(script, env=env, text=True, capture_output=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(read(tmp_path, "compare.json"))["tasks"]["chartqa"]["answers_equal"] == 2

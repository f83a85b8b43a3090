"""lmms-eval itself, in a process of its own, on its real task `chartqa` without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from eval_support import read
from tiny_draft import make_draft

from eagle.families import load_target
from lmms_eval_msd import MODELS
from lmms_eval_msd.offline import write_chartqa

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(questions, tmp_path_factory) -> Path:
    """A working directory in which `chartqa` finds its data set."""
    folder = tmp_path_factory.mktemp("run")
    write_chartqa(questions, folder)
    return folder


def run(data: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a module in ``data``."""
    return python(data, "-m", *command, path=path)


def python(data: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python in ``data``; ``path`` is searched for modules and distributions before all others."""
    folders = ([] if path is None else [path]) + [REPO / name for name in ("LLaVA", "EAGLE", "lmms-eval")]
    packages = os.pathsep.join(map(str, folders))
    env = os.environ | {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "HF_HOME": str(data / "hf"), "COLUMNS": "200"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, *command], cwd=data, env=env, text=True, capture_output=True, timeout=1800)
    result.stdout += result.stderr
    return result


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


def test_few_shot_examples_and_system_instruction(base, data, monkeypatch, tmp_path):
    """`--num_fewshot` and `--system_instruction`: lmms-eval puts both before the question, and the model reads them."""
    import lmms_eval.tasks
    from lmms_eval.evaluator import simple_evaluate

    from lmms_eval_msd.hook import TASKS
    from lmms_eval_msd.prompts import LlavaPrompts

    task = (TASKS / "chartqa_msd.yaml").read_text().replace("chartqa_msd\n", "chartqa_few\n").replace(" 512", " 6")
    few = "fewshot_split: test\nfewshot_config:\n  sampler: default\n"
    (tmp_path / "chartqa_few.yaml").write_text(task + few)
    written, write = [], LlavaPrompts.write
    monkeypatch.setattr(LlavaPrompts, "write", lambda *given: written.append(write(*given)) or written[-1])
    monkeypatch.chdir(data)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", data / "cache")
    results = simple_evaluate(
        model="llava_msd",
        model_args=f"pretrained={base},dtype=float32",
        tasks=["chartqa_few"],
        device="cpu",
        task_manager=lmms_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        num_fewshot=1,
        system_instruction="Be brief.",
    )
    assert len(written) == len(results["samples"]["chartqa_few"]) == 3
    for number, prompt in enumerate(written):
        first, last = prompt.text.split("USER: <image>\nBe brief.How many shapes ")[1].split("\n\nHow many shapes ")
        assert first.endswith(f"as a single word. {first[0]}")  # a question, and its answer after it
        assert last.startswith(f"{number}?") and last.endswith(" ASSISTANT:")
        assert len(prompt.visuals) == 1


def test_dummy_model_is_left_alone(data, monkeypatch, tmp_path, capsys):
    """lmms-eval's own model with our hooks in place: its scores, and nothing of ours in the results."""
    import lmms_eval.tasks
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    from lmms_eval_msd import manifests

    manifests()
    monkeypatch.chdir(data)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", data / "cache")
    folder = str(Path(lmms_eval.tasks.__file__).parent / "chartqa")
    manager = lmms_eval.tasks.TaskManager(include_path=folder, include_defaults=False, model_name="dummy")
    tracker = EvaluationTracker(output_path=str(tmp_path))
    results = simple_evaluate(
        model="dummy",
        model_args="response=1",
        tasks=["chartqa"],
        task_manager=manager,
        evaluation_tracker=tracker,
    )
    assert results["results"]["chartqa"]["relaxed_overall,none"] == pytest.approx(1 / 3)  # the answers are 0, 1 and 2
    tracker.save_results_aggregated(results={"results": results["results"]}, samples=None, datetime_str="a")
    assert "msd" not in json.loads(read(tmp_path, "_results.json"))
    assert list(tmp_path.rglob("*_msd.json")) == []
    assert "decoding" not in capsys.readouterr().out


CONSOLE_SCRIPT = ("-c", "from lmms_eval.cli.dispatch import main; main()")  # of the command `lmms-eval`


def assert_flags_in_help(data: Path, *command: str) -> None:
    result = python(data, *command, "eval", "--help")
    assert result.returncode == 0, result.stdout
    flags = ("--use_msd", "--msd_model_path DRAFT", "--msd_baseline measure|RESULTS")
    assert all(flag in result.stdout for flag in flags)
    assert f"({', '.join(MODELS)})" in result.stdout


@pytest.mark.slow
def test_flags_in_the_help_of_the_console_script(data):
    """lmms-eval's real parser in a process of its own: the plugin is found, and its hook works."""
    assert_flags_in_help(data, *CONSOLE_SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["lmms_eval", "lmms_eval_msd"])
def test_help_of_the_modules(module, data):
    assert_flags_in_help(data, "-m", module)
    result = run(data, module, "--help")
    assert result.returncode == 0, result.stdout
    assert ("Run model evaluation" if module == "lmms_eval" else "lmms_eval_msd eval --help") in result.stdout


@pytest.mark.slow
def test_run_of_another_model(data):
    """lmms-eval's own models work as before."""
    out = data / "dummy"
    result = run(data, "lmms_eval", "--model", "dummy", "--tasks", "chartqa", "--output_path", str(out))
    assert result.returncode == 0, result.stdout
    saved = json.loads(read(out, "_results.json"))
    assert "relaxed_overall,none" in saved["results"]["chartqa"]
    assert "msd" not in saved


@pytest.mark.slow
def test_config_file_runs_base_and_msd(base, draft, data):
    common = {"model": "llava_msd", "tasks": "chartqa", "batch_size": 1, "gen_kwargs": "temperature=0"}
    common |= {"model_args": f"pretrained={base},msd_depth=2,msd_top_k=3,msd_total_tokens=8", "log_samples": True}
    flags = {"use_msd": True, "msd_model_path": str(draft), "msd_baseline": str(data / "base")}
    plain = {"output_path": str(data / "base"), "msd_baseline": "measure"}
    configs = [common | plain, common | flags | {"output_path": str(data / "msd")}]
    (data / "run.yaml").write_text(yaml.safe_dump(configs))
    result = run(data, "lmms_eval", "--config", "run.yaml")
    assert result.returncode == 0, result.stdout
    assert "MSD decoding, float32" in result.stdout
    report = json.loads(read(data / "msd", "_msd.json"))
    assert report["use_msd"]
    assert report["tasks"]["chartqa"]["answers"] == 3
    assert report["tasks"]["chartqa"]["tokens"] <= 3 * 16  # the task's max_new_tokens
    assert report["tasks"]["chartqa"]["speedup"] == report["total"]["speedup"] > 0
    assert report["baseline"]["differences"] == {}
    assert report["baseline"]["name"] in report["baseline"]["chosen_from"][0]
    saved = json.loads(read(data / "msd", "_results.json"))
    assert saved["msd"] == report
    assert saved["throughput"]["avg_tau"] == report["total"]["tau"]
    assert f"use_msd=True,msd_model_path={draft},msd_baseline=" in saved["config"]["model_args"]

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
def test_run_of_qwen3_vl(qwen3, tmp_path, data):
    """With a draft and without: equal answers, and the settings of the family are accepted."""
    draft = make_draft(tmp_path / "draft", load_target(qwen3), agree=1.0)
    common = ["--model", "qwen3_vl_msd", "--tasks", "chartqa", "--log_samples", "--gen_kwargs", "temperature=0"]
    common += ["--model_args", f"pretrained={qwen3},dtype=float32,max_pixels=200704,min_pixels=4096"]
    answers = {}
    flags = ["--use_msd", "--msd_model_path", str(draft)]
    for name, module, more in (("base", "lmms_eval_msd", []), ("msd", "lmms_eval", flags)):
        out = tmp_path / name
        result = run(data, module, *common, *more, "--output_path", str(out))
        assert result.returncode == 0, result.stdout
        report = json.loads(read(out, "_msd.json"))
        assert (report["use_msd"], report["total"]["answers"]) == (name == "msd", 3)
        samples = [json.loads(line) for line in read(out, "_samples_chartqa.jsonl").splitlines()]
        answers[name] = sorted((each["doc_id"], each["filtered_resps"][0]) for each in samples)
    assert answers["base"] == answers["msd"]
    assert all(text for _, text in answers["msd"])
    assert report["total"]["cycles"] > 0


@pytest.mark.slow
def test_two_processes_give_what_one_gives(base, draft, data):
    """Scores, answers and counts; and both processes end. (`accelerate launch --cpu` starts two only with MPI.)

    The two read their settings from a file, of which lmms-eval's parser knows nothing.
    """
    settings = {"model": "llava_msd", "model_args": f"pretrained={base},dtype=float32,msd_depth=2,msd_total_tokens=8"}
    settings |= {"use_msd": True, "msd_model_path": str(draft), "tasks": "chartqa,chartqa_msd", "log_samples": True}
    settings |= {"gen_kwargs": "max_new_tokens=12"}
    two = ["torch.distributed.run", "--nproc_per_node=2", "--master_port=29507", "-m"]
    saved, answers = {}, {}
    for name, launcher in (("one", []), ("two", two)):
        out = data / name
        (data / f"{name}.yaml").write_text(yaml.safe_dump(settings | {"output_path": str(out)}))
        result = run(data, *launcher, "lmms_eval", "--config", f"{name}.yaml")
        assert result.returncode == 0, result.stdout
        assert result.stdout.count("MSD decoding, float32") == 1
        saved[name] = json.loads(read(out, "_results.json"))
        for task in ("chartqa", "chartqa_msd"):
            samples = [json.loads(line) for line in read(out, f"_samples_{task}.jsonl").splitlines()]
            answers[name, task] = sorted((each["doc_id"], each["filtered_resps"][0]) for each in samples)
            assert len(answers[name, task]) == 3
    assert saved["one"]["results"] == saved["two"]["results"]
    assert [saved[name]["msd"]["processes"] for name in saved] == [1, 2]
    for task in ("chartqa", "chartqa_msd"):
        assert answers["one", task] == answers["two", task]
        for key in ("answers", "tokens", "cycles", "tau", "histogram", "acceptance_by_position"):
            assert saved["one"]["msd"]["tasks"][task][key] == saved["two"]["msd"]["tasks"][task][key], (task, key)


@pytest.mark.slow
def test_beside_a_broken_plugin(base, data, tmp_path):
    """lmms-eval's own command leaves our models out and says why; ours has them."""
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\nbroken = broken_plugin:manifests\n")
    (tmp_path / "broken_plugin.py").write_text('raise RuntimeError("the licence server does not answer")\n')
    arguments = ["--model", "llava_msd", "--model_args", f"pretrained={base}", "--tasks", "chartqa", "--limit", "1"]
    theirs = run(data, "lmms_eval", *arguments, path=tmp_path)
    assert "the licence server does not answer" in theirs.stdout
    assert "'llava_msd' not found" in theirs.stdout
    ours = run(data, "lmms_eval_msd", *arguments, "--output_path", str(data / "beside"), path=tmp_path)
    assert ours.returncode == 0, ours.stdout
    assert "plugin 'broken' (broken-plugin 1.0, broken_plugin:manifests) of lmms-eval is broken" in ours.stdout
    assert json.loads(read(data / "beside", "_msd.json"))["total"]["answers"] == 1


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
        (["--model", "llava_msd", "--model_args", "pretrained=/none", "--tasks", "chartqa"], "not found"),
        *(
            pytest.param(*case, marks=pytest.mark.by_hand)
            for case in (
                (["--model", "llava_hf", "--tasks", "chartqa", "--use_msd"], "does not work with --model llava_hf"),
                (
                    ["--model", "qwen2_vl_msd", "--model_args", "pretrained=BASE", "--tasks", "chartqa"],
                    "use --model llava_msd",
                ),
            )
        ),
    ],
)
def test_errors_are_one_line(base, data, arguments, message):
    result = run(data, "lmms_eval", *(argument.replace("BASE", str(base)) for argument in arguments))
    assert result.returncode == 2, result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in result.stdout


@pytest.mark.slow
def test_failed_evaluation_fails(base, data):
    result = run(data, "lmms_eval", "--model", "llava_msd", "--model_args", f"pretrained={base}", "--tasks", "no_such")
    assert result.returncode == 1, result.stdout
    assert "no_such" in result.stdout

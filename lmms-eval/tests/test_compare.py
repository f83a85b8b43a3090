from __future__ import annotations

import json

import pytest

from llava import UserError
from lmms_eval_msd.compare import compare, main
from lmms_eval_msd.report import load_run


def write_run(folder, use_msd, answers, speed, score=0.5, tasks=("chartqa",), **changes):
    (folder / "model").mkdir(parents=True)
    row = {"answers": 2, "tokens": 20, "cycles": 5, "tau": 3.6 if use_msd else 1.0, "seconds": 2.0, "phases_ms": {}}
    row |= {"tokens_per_second": speed, "histogram": {"2": 5}, "acceptance_by_position": [1.0, 1.0]}
    scores = {"alias": "chartqa", "relaxed_overall,none": score, "relaxed_overall_stderr,none": 0.1, "n,none": "N/A"}
    decoding = {"use_msd": use_msd, "base": "b", "draft": "d", "dtype": "float32", "tree": None, "processes": 1}
    decoding |= {"hardware": "cpu", "versions": {}, "tasks": dict.fromkeys(tasks, row), "total": row} | changes
    results = {"results": dict.fromkeys(tasks, scores), "msd": decoding}
    (folder / "model" / "1_results.json").write_text(json.dumps(results))
    lines = [json.dumps({"doc_id": number, "filtered_resps": text}) for number, text in enumerate(answers)]
    for task in tasks:
        (folder / "model" / f"1_samples_{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    base = write_run(tmp_path / "base", False, ["a", "b"], 10.0)
    return base, write_run(tmp_path / "msd", True, ["a", ["c"]], 25.0, score=0.25), tmp_path / "out"


def test_table_json_and_chart(runs, capsys):
    base, msd, out = runs
    argv = ["--base", str(base), "--msd", str(msd), "--out", str(out)]
    assert main(argv) == 0
    row = json.loads((out / "compare.json").read_text())["tasks"]["chartqa"]
    assert row["metrics"] == {"relaxed_overall": {"base": 0.5, "msd": 0.25}}
    assert (row["answers_equal"], row["answers"], row["tau"], row["speedup"]) == (1, 2, 3.6, 2.5)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "1/2" in capsys.readouterr().out
    assert main([*argv, "--require-equal"]) == 1


def test_absent_results(runs, tmp_path):
    base, msd, _ = runs
    with pytest.raises(UserError, match="no results"):
        load_run(tmp_path / "nothing", False)
    with pytest.raises(UserError, match="exchange"):
        load_run(msd, False)
    (base / "model" / "1_samples_chartqa.jsonl").unlink()
    with pytest.raises(UserError, match="log_samples"):
        load_run(base, False)


def test_runs_of_different_questions(runs, tmp_path):
    base = runs[0]
    other = write_run(tmp_path / "other", True, ["a"], 1.0)
    with pytest.raises(UserError, match="different questions"):
        compare(load_run(base, False), load_run(other, True))
    other = write_run(tmp_path / "more", True, ["a", "b"], 1.0, tasks=("chartqa", "mme"))
    with pytest.raises(UserError, match="different tasks"):
        compare(load_run(base, False), load_run(other, True))


def test_runs_of_different_machines(runs, tmp_path, capsys):
    base = runs[0]
    other = write_run(tmp_path / "gpu", True, ["a", "b"], 50.0, hardware="gpu", processes=2)
    apart = compare(load_run(base, False), load_run(other, True))["differences"]
    assert apart == {"hardware": ["cpu", "gpu"], "processes": [1, 2]}
    assert main(["--base", str(base), "--msd", str(other), "--out", str(tmp_path / "out")]) == 0
    assert "differ in hardware: base cpu, MSD gpu" in capsys.readouterr().out

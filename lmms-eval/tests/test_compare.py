from __future__ import annotations

import json

import pytest

from llava import UserError
from lmms_eval_msd.compare import compare, main
from lmms_eval_msd.report import load_run


def write_run(folder, use_msd, answers, speed, score=0.5, tasks=("chartqa",), shares=(1.0, 1.0), **changes):
    (folder / "model").mkdir(parents=True)
    row = {"answers": 2, "tokens": 20, "cycles": 5, "tau": 3.6 if use_msd else 1.0, "seconds": 2.0, "phases_ms": {}}
    row |= {"tokens_per_second": speed, "histogram": {"2": 5}, "acceptance_by_position": list(shares)}
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
    assert json.loads((out / "compare.json").read_text())["others"] == []
    assert main([*argv, "--require-equal"]) == 1


def test_a_base_run_that_chose_its_way_is_named(tmp_path):
    chosen = {"name": "generate", "chosen_from": [{"generate": 10.0}], "differences": {}}
    base = write_run(tmp_path / "base", False, ["a", "b"], 10.0, baseline=chosen)
    msd = write_run(tmp_path / "msd", True, ["a", "b"], 25.0)
    found = compare(load_run(base, use_msd=False), load_run(msd, use_msd=True))
    assert found["baseline"] == "generate" and found["tasks"]["chartqa"]["speedup"] == 2.5


POSITIONS = [0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19]


@pytest.fixture
def two_drafts(tmp_path):
    """The arguments of a comparison with long names."""
    tasks = ("chartqa_msd", "textvqa_val_msd")
    base = write_run(tmp_path / "base", False, ["a", "b"], 1042.0, tasks=tasks)
    drafts = [
        write_run(
            tmp_path / name, True, ["a", "b"], speed, tasks=tasks, draft=f"a-place/of-drafts/{name}", shares=shares
        )
        for name, speed, shares in (("trained", 2084.0, POSITIONS), ("shipped", 4168.0, POSITIONS[:2]))
    ]
    return ["--base", str(base), "--msd", *map(str, drafts), "--out", str(tmp_path / "out")]


def test_tables_fit_80_columns(two_drafts, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(two_drafts) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, (line for line in lines if not line.startswith("page ")))) <= 80
    for whole in (
        "textvqa_val_msd base 1042.0 1.00x 1.00",
        "MSD 2 2/2 4168.0 4.00x 3.60",
        "chartqa_msd relaxed_overall 0.5 0.5 0.5",
        "textvqa_val_msd MSD 1 0.91 0.82 0.73 0.64 0.55 0.46 0.37 0.28",
    ):
        assert whole in [" ".join(line.split()) for line in lines], "\n".join(lines)
    assert "MSD 1    a-place/of-drafts/trained" in lines and "MSD 2    a-place/of-drafts/shipped" in lines
    assert not any("…" in line for line in lines)


def test_page_has_everything(two_drafts, tmp_path, capsys):
    assert main(two_drafts) == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    for line in (
        "- base: `b`",
        "- MSD 2: `a-place/of-drafts/shipped`",
        "- machine: `cpu, float32, 1 process(es)`",
        "| task | run | equal answers | tokens/s | speed-up | τ |",
        "|  | MSD 2 | 2/2 | 4168.0 | 4.00x | 3.60 |",
        "| task | metric | base | MSD 1 | MSD 2 |",
        "| textvqa_val_msd | relaxed_overall | 0.5 | 0.5 | 0.5 |",
        "| chartqa_msd | MSD 1 | 0.91 | 0.82 | 0.73 | 0.64 | 0.55 | 0.46 | 0.37 | 0.28 | 0.19 |",
        "|  | MSD 2 | 0.91 | 0.82 |  |  |  |  |  |  |  |",
        "![tokens per second](compare.png)",
    ):
        assert line in text.splitlines(), text
    comparison = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [one["draft"].rsplit("/", 1)[1] for one in (comparison, *comparison["others"])] == ["trained", "shipped"]


def test_the_measured_baseline_is_named(runs, tmp_path, capsys):
    """The speed-up is over what the run with the draft measured, in both conventions; else the page says what it is."""
    base, msd, out = runs
    argv = ["--base", str(base), "--out", str(out), "--msd"]
    assert main([*argv, str(msd)]) == 0
    assert "- speed-up: `over the base run; other plain ways were not measured`" in (out / "compare.md").read_text()
    fast = write_run(tmp_path / "compiled", True, ["a", "b"], 25.0, compile="inductor")
    assert main([*argv, str(fast)]) == 0
    assert json.loads((out / "compare.json").read_text())["tasks"]["chartqa"]["speedup"] is None
    other = write_run(tmp_path / "measured", True, ["a", "b"], 25.0, baseline={"name": "loop, compiled"})
    path = other / "model" / "1_results.json"
    results = json.loads(path.read_text())
    paired = {"mean": 1.75, "low": 1.5, "high": 2.0}
    later = {"speedup": 1.5, "paired_speedup": {"mean": 1.25, "low": None, "high": None}, "baseline_name": "x"}
    results["msd"]["tasks"]["chartqa"] |= {"speedup": 1.6, "paired_speedup": paired, "after_first_token": later}
    path.write_text(json.dumps(results))
    assert main([*argv, str(other)]) == 0
    text = (out / "compare.md").read_text()
    for line in (
        "- speed-up: `over loop, compiled`", "| chartqa | base |  | 10.0 |  | 1.00 |",
        "|  | MSD | 2/2 | 25.0 | 1.60x | 3.60 |", "| chartqa | MSD | 1.60x | 1.75x [1.50, 2.00] | 1.50x | 1.25x |",
    ):  # fmt: skip
        assert line in text.splitlines(), text
    assert json.loads((out / "compare.json").read_text())["baseline"] == "loop, compiled"


def test_a_draft_whose_training_was_stopped(runs, tmp_path, capsys):
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "provenance.json").write_text(json.dumps({"step": 4, "total_steps": 9}))
    msd = write_run(tmp_path / "part", True, ["a", "b"], 25.0, draft=str(tmp_path / "draft"))
    assert main(["--base", str(runs[0]), "--msd", str(msd), "--out", str(tmp_path / "out")]) == 0
    assert f"{tmp_path}/draft (trained for 4 of 9 steps)" in capsys.readouterr().out.replace("\n", "")
    assert "(trained for 4 of 9 steps)" in (tmp_path / "out" / "compare.md").read_text()


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

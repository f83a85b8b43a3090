"""`msd report`: results of every kind side by side, what differs, and which differences are larger than the spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagle.cli import main
from eagle.report.intervals import Interval, bootstrap, of_mean, of_ratio, of_speedup
from eagle.report.runs import read_run
from llava import UserError

MADE = {"hardware": {"cpu": "a CPU", "threads": 2}, "versions": {"torch": "2"}, "commit": "c", "date": "2026-01-01"}


def bench(speeds: list[float], dtype: str = "float32") -> dict[str, Any]:
    """A report of `msd bench`: at each speed a question with two cycles of 4 and 2 tokens, τ 3; plain decoding has 1
    token a second."""
    answers = [
        {"id": str(n), "source": "", "cycles": [[1], [2, 3, 4, 5], [6, 7]], "accepted": [3, 1], "baseline_tokens": 7,
         "seconds": {"msd": 7 / speed, "baseline": 7.0}, "first_token_seconds": {"msd": 0.1, "baseline": 0.1}}
        for n, speed in enumerate(speeds)
    ]  # fmt: skip
    return {
        **MADE, "baselines": {}, "phases_ms": {}, "tau": 3.0, "speedup": 2.0, "questions": len(speeds),
        "baseline_name": "plain", "tokens_per_second": {"msd": 2.0, "baseline": 1.0}, "answers": answers,
        "first_token_ms": {"MSD": 100.0}, "paired_speedup": of_mean(speeds)._asdict() | {"mean": 2.0},  # type: ignore[union-attr]
        "settings": {"base_model": "b", "msd_model": "d", "dtype": dtype, "temperature": 0.0, "data": "q.jsonl"},
    }  # fmt: skip


SERVER = {
    **MADE, "server": "http://a", "plain": None, "model": "m", "settings": {"temperature": 0.0, "max_tokens": 8},
    "levels": [{"concurrency": 2, "rate": None, "tokens_per_second": 30.0, "acceptance_length": 2.5, "speedup": 1.5,
                "first_token_ms": {"median": 20.0}, "equal_answers": 3, "requests": 4}],
}  # fmt: skip
CELL = {
    "title": "cell", "rounds": 3, "noisy_rounds": [1], "doubtful": False, "baseline_name": "plain",
    "results": {
        "plain": {"new_tokens": 10, "seconds": [10.0, 99.0, 10.0], "first_token_ms": 5.0, "tau": 1.0,
                  "answers_that_differ": 0},
        "msd": {"new_tokens": 10, "seconds": [5.0, 99.0, 4.0], "first_token_ms": 5.0, "tau": 3.5,
                "answers_that_differ": 0},
    },
}  # fmt: skip
SUITE = {
    **MADE, "suite": "pocket", "cells": [CELL],
    "settings": {"models": {"a": {"base": "b", "draft": "d"}}, "dtype": "auto", "data": "q", "rounds": 3, "seed": 0,
                 "tolerance": 0.1},
}  # fmt: skip
LMMS = {
    "results": {"chartqa": {"alias": "chartqa", "accuracy,none": 0.5, "accuracy_stderr,none": 0.1, "f1,none": 0.2,
                            "f1_stderr,none": "N/A"}},
    "msd": {"use_msd": True, "base": "b", "draft": "d", "dtype": "float32", "batch_size": 1, "processes": 1,
            "hardware": "a CPU", "versions": {}, "tasks": {"chartqa": {"tau": 2.0, "tokens_per_second": 9.0}}},
}  # fmt: skip
GPU = {
    **MADE, "settings": {"dtype": "float16", "new_tokens": 8, "questions": 2, "base": None, "draft": None},
    "parts": [
        {"name": "pair: identity of answers", "error": None, "figures": {"questions": 20, "differ": 1}},
        {"name": "broken: speed", "error": "failed", "figures": {}},
        {"name": "pair: speed", "error": None, "figures": {"ways": [
            {"way": "MSD", "tokens/s": 9.0, "first token ms": 3.0, "tau": 4.0, "speed-up of totals": 2.0,
             "mean of paired speed-ups": 1.9}]}},
    ],
}  # fmt: skip
TRAINING = {
    "settings": {"base": "b"}, "steps": [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0}],
    "validations": [{"step": 3, "results": {"text": {"tau": 2.0}, "image": {"tau": 3.0}}}],
    "served": [{"step": step, "answers": [{"cycles": [[1], [2] * length]}] * 3} for step, length in ((2, 1), (4, 2))],
}  # fmt: skip


def test_intervals() -> None:
    """Worked: of two equal halves the means are 1, 2 or 3; ratios of sums weigh by length."""
    assert of_mean([1.0, 3.0]) == Interval(2.0, 1.0, 3.0) and of_mean([]) is None and of_mean([2.0]) == Interval(2.0)
    assert of_ratio([(10.0, 1.0), (10.0, 9.0)]).value == 2.0  # type: ignore[union-attr]
    assert of_speedup([(4.0, 1.0)] * 2, [(2.0, 1.0)] * 2) == Interval(2.0, 2.0, 2.0)
    wide, narrow = (of_mean([1.0, 2.0, 3.0, 4.0] * times) for times in (2, 50))
    assert wide is not None and narrow is not None and wide.low < narrow.low < 2.5 < narrow.high < wide.high  # type: ignore[operator]
    assert bootstrap([(1.0, 0.0)], lambda sums: sums[..., 0] / sums[..., 1]) is None, "nothing to divide by"


def write(folder: Path, **contents: Any) -> list[str]:
    paths = []
    for name, content in contents.items():
        path = folder / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        paths.append(str(path))
    return paths


def compared(folder: Path, *paths: str) -> dict[str, Any]:
    """Verdicts by measure, and everything else of the JSON."""
    assert main(["report", *paths, "--json", str(folder / "out.json")]) == 0
    found = json.loads((folder / "out.json").read_text())
    return {**found, "verdicts": {each["measure"]: each["difference"] for each in found["comparisons"]}}


def test_a_difference_within_the_spread_is_not_called_real(tmp_path: Path) -> None:
    """The means are 2.0, 2.1 and 9.0; the first two spread from 1 to 3."""
    spread = [1.0, 2.0, 3.0] * 4
    paths = write(tmp_path, a=bench(spread), b=bench([each + 0.1 for each in spread]), c=bench([9.0] * 12))
    near = compared(tmp_path, *paths[:2])["verdicts"]
    assert near["tokens/s"] == near["speed-up of totals"] == "within the spread" and near["τ"] == "equal"
    far = compared(tmp_path, paths[0], paths[2])["verdicts"]
    assert far["tokens/s"] == far["speed-up of totals"] == "higher"
    assert compared(tmp_path, paths[2], paths[0])["verdicts"]["tokens/s"] == "lower"


def test_a_busier_machine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same answers, but every request took three times as long."""
    quiet, busy = bench([1.9, 2.0, 2.1] * 4), bench([1.9, 2.0, 2.1] * 4)
    for answer in busy["answers"]:
        answer["seconds"] = {name: 3 * seconds for name, seconds in answer["seconds"].items()}
    paths, said = write(tmp_path, a=quiet, b=busy), "Plain decoding was not equally fast in A and B"
    found = compared(tmp_path, *paths)["verdicts"]
    assert found["tokens/s"] == found["plain tokens/s"] == "lower"
    assert found["speed-up of totals"] not in ("higher", "lower")
    assert said in " ".join(capsys.readouterr().out.split())
    compared(tmp_path, paths[0], paths[0])
    assert said not in " ".join(capsys.readouterr().out.split())


def test_nothing_is_said_without_a_recorded_spread(tmp_path: Path) -> None:
    old = {key: value for key, value in bench([9.0] * 9).items() if key not in ("answers", "paired_speedup")}
    assert compared(tmp_path, *write(tmp_path, a=bench([1.0, 3.0]), b=old))["verdicts"]["tokens/s"] == "spread unknown"


def test_settings_that_differ_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, a=bench([1.0, 2.0]), b=bench([1.0, 2.0], dtype="bfloat16"))
    assert compared(tmp_path, *paths)["settings_that_differ"] == {"dtype": ["float32", "bfloat16"]}
    assert "The runs differ in dtype: a difference may come from any of these." in capsys.readouterr().out


def figures(folder: Path, content: Any) -> dict[str, dict[str, Interval]]:
    """By row: part and way."""
    return {f"{row.part}, {row.way}": row.figures for row in read_run(Path(*write(folder, x=content))).rows}  # type: ignore[misc]


def test_every_kind_is_read(tmp_path: Path) -> None:
    (own,) = figures(tmp_path, bench([2.0, 2.0])).values()
    assert own["τ"] == Interval(3.0, 3.0, 3.0) and own["tokens/s"].value == pytest.approx(2.0)
    server = figures(tmp_path, SERVER)["2 at a time, server"]
    assert server["τ"] == Interval(2.5) and server["speed-up of totals"] == Interval(1.5)
    suite = figures(tmp_path, SUITE)
    assert list(suite) == ["cell, msd", "cell, plain"], "the rows of MSD come first"
    assert suite["cell, msd"]["speed-up of totals"].value == pytest.approx(20 / 9), "the noisy round is left out"
    assert suite["cell, msd"]["speed-up of totals"].low == pytest.approx(2.0)
    lmms = figures(tmp_path, LMMS)["chartqa, MSD"]
    assert lmms["τ"] == Interval(2.0) and lmms["f1"] == Interval(0.2)
    assert lmms["accuracy"] == pytest.approx((0.5, 0.304, 0.696))
    assert figures(tmp_path, LMMS["msd"])["chartqa, MSD"]["τ"] == Interval(2.0), "the file beside the results"
    assert figures(tmp_path, GPU)["pair, MSD"]["paired speed-up"] == Interval(1.9)
    assert read_run(Path(*write(tmp_path, g=GPU))).rows[0].identical == "19/20"
    training = figures(tmp_path, TRAINING)
    assert list(training) == ["step 4, MSD", "step 2, MSD"] and training["step 4, MSD"]["simulated τ"].value == 2.5
    assert "simulated τ" not in training["step 2, MSD"], "the first validation came later"
    assert training["step 4, MSD"]["training loss"].value == 2.0


def test_kinds_are_compared_by_their_main_rows(tmp_path: Path) -> None:
    paths = write(tmp_path, a=bench([2.0, 2.0]), b=SERVER, c=LMMS, d=GPU, e=SUITE)
    found = compared(tmp_path, *paths)
    rows = {tuple(each["rows"]) for each in found["comparisons"]}
    assert rows == {("total, MSD", other) for other in
                    ("2 at a time, server", "chartqa, MSD", "pair, MSD", "cell, msd")}  # fmt: skip
    assert found["settings_that_differ"]["engine"] == [
        "msd bench", "server", "lmms-eval", "benchmarks.gpu_check", "benchmarks.suite",
    ]  # fmt: skip


def test_evaluations_of_a_training_run_are_compared(tmp_path: Path) -> None:
    found = compared(tmp_path, *write(tmp_path, t=TRAINING))
    assert [each["rows"] for each in found["comparisons"]] == [["step 2, MSD", "step 4, MSD"]] * 2
    assert found["verdicts"] == {"τ": "higher", "training loss": "spread unknown"}


def test_the_newest_results_of_lmms_eval_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "1_results.json").write_text(json.dumps(LMMS))
    assert read_run(tmp_path / "run").kind == "lmms-eval"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no results of lmms-eval in this folder"):
        read_run(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1}, "not a file of results"),
        ([1, 2], "not a file of results"),
        ("{", "not valid JSON"),
        ({**SUITE, "cells": [{}]}, "not complete (KeyError"),
        ({**LMMS["msd"], "tasks": {}}, "without a figure"),
        ({key: value for key, value in TRAINING.items() if key != "served"}, "train with --eval-data"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, content: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *write(tmp_path, bad=content)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and words in shown and "bad.json" in shown


def test_markdown_and_page(tmp_path: Path) -> None:
    paths = write(tmp_path, a=bench([1.0, 2.0, 4.0]), b=bench([1.5, 2.0, 3.0]), t=TRAINING)
    assert main(["report", *paths, "--markdown", str(tmp_path / "r.md"), "--html", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.md").read_text()
    assert "| A → B | total, MSD | τ | 3.00 [3.00, 3.00] | 3.00 [3.00, 3.00] | +0.0% | equal |" in text
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page and page.count("<svg") >= 3 and "τ in training" in page


def of_llava(**settings: Any) -> dict[str, Any]:
    """A report of the published LLaVA-1.5-7B with an MSD draft, at the published setting of the third-party rerun."""
    report = bench([1.0, 2.0])
    published = {"base_model": "llava-hf/llava-1.5-7b-hf", "msd_model": "lucylyn/MSD-LLaVA1.5-7B", "dtype": "float16",
                 "data": "/cache/mmspec/test/questions.jsonl"}  # fmt: skip
    setting = {"dtype": "float16", "attention": "eager", "batch": 1}
    return {**report, "questions": 723, "setting": setting, "settings": {**report["settings"], **published, **settings}}


def test_published_rows_are_shown_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of MSD on LLaVA-1.5-7B; the rerun states all but its machine."""
    (path,) = write(tmp_path, a=of_llava())
    names = {"--markdown": tmp_path / "r.md", "--html": tmp_path / "r.html", "--json": tmp_path / "r.json"}
    assert main(["report", path, *(str(word) for pair in names.items() for word in pair)]) == 0
    found = json.loads(names["--json"].read_text())
    assert {(row["method"], row["base"]) for row in found["published"]} == {("MSD", "LLaVA-1.5-7B")}
    assert [row["speedup"] for row in found["published"]] == [2.114, 1.823, 2.29]
    rerun, _, abstract = found["published"]
    assert rerun["differs"]["A"] == [] and abstract["differs"]["A"] == ["other questions"]
    assert list(found["runs"]) == ["A"] and not found["comparisons"]
    title, texts = (
        "Published figures, measured by others",
        (capsys.readouterr().out, *(p.read_text() for p in names.values())),
    )
    setting = "temperature 0.0, dtype float16, attention eager, batch 1; not stated: machine"
    line = f"| MSD | LLaVA-1.5-7B | MMSpec, 600 samples, 723 turns | {setting} | 4.75 with bonus | 2.11x totals | 88% |"
    assert f"{line} A: nothing | [1] |" in texts[1]
    assert "| not stated: temperature, dtype, attention, batch, machine |  | 2.29x largest |" in texts[1]
    for text in texts[:3]:
        assert title in text and "4.75" in text and "totals" in text and "MMSpec-fyf@96db29db" in text
        own, _, theirs = text.partition(title)
        assert "4.75" not in own and "ViSpec" not in theirs
    assert "enter no figure of the runs" in texts[1] and "enter no figure of the runs" in texts[2]


@pytest.mark.parametrize(
    ("options", "settings", "shown"),
    [
        ([], {"msd_model": "outputs/checkpoints/final"}, {"MSD", "ViSpec", "EAGLE-1", "EAGLE-2", "EAGLE-3"}),
        ([], {"msd_model": "someone/EAGLE-3-LLaVA1.5"}, {"EAGLE-3"}),
        ([], {"base_model": "pocket/llava"}, set()),
        ([], {"base_model": "llava-hf/llava-1.5-13b-hf"}, {"MSD"}),
        (["--published", "none"], {}, set()),
        (["--published", "all"], {"base_model": "b"}, {"MSD", "ViSpec", "EAGLE-1", "EAGLE-2", "EAGLE-3", "SpecVLM"}),
    ],
)
def test_which_published_rows_are_shown(
    tmp_path: Path, options: list[str], settings: dict[str, str], shown: set[str]
) -> None:
    paths = write(tmp_path, a=of_llava(**settings))
    found = compared(tmp_path, *paths, *options)
    assert {row["method"] for row in found["published"]} == shown
    page = tmp_path / "r.html"
    assert main(["report", *paths, *options, "--html", str(page)]) == 0
    assert ("Published figures" in page.read_text()) == bool(shown)


def test_a_published_row_says_which_settings_differ(tmp_path: Path) -> None:
    report = of_llava(temperature=1.0)
    report["setting"] = {"dtype": "bfloat16", "attention": "sdpa", "batch": 1}
    found = compared(tmp_path, *write(tmp_path, a=report))
    assert found["published"][0]["differs"]["A"] == [
        "temperature 1.0", "dtype bfloat16", "attention sdpa",
    ]  # fmt: skip

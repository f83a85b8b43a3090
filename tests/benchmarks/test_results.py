"""The tables of docs/results.md: what a sent report needs, and that the page has its rows."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from repository import REPO

from benchmarks.results import PAGE, POCKET, ROWS, read_rows, run
from eagle.published import published_rows
from llava import UserError


def logged(number: int) -> dict[str, Any]:
    """An answer of 31 tokens in ten cycles, the last of which is cut. One of the ten differs from the plain one; half
    of them are 1.6 times, half 2.2 times as fast as plain decoding."""
    lengths, seconds = [1, *[2] * 4, *[4] * 5, 2], (0.31 / 1.2, 0.62 / 1.2)[number % 2]
    return {
        "cycles": [[7] * length for length in lengths], "accepted": [1] * 4 + [3] * 6, "baseline_tokens": 31,
        "plain": [7] * 30 + [7 if number else 8],
        "seconds": {"msd": seconds, "baseline": seconds * (1.6, 2.2)[number % 2]},
    }  # fmt: skip


REPORT: dict[str, Any] = {
    "speedup": 2.0, "paired_speedup": {"mean": 1.9, "low": 1.8, "high": 2.1}, "tau": 3.0, "accepted_per_cycle": 2.2,
    "identical": {"answers": 9, "of": 10, "near_ties": 1, "to": "transformers generate float16"},
    "tokens_per_second": {"msd": 80.0, "baseline": 40.0}, "baseline_name": "autoregressive float16",
    "first_token_ms": {"MSD float16": 60.0, "autoregressive float16": 59.0}, "new_tokens": 310, "cycles": 100,
    "questions": 10, "histogram": {"1": 40, "3": 60}, "date": "2026-11-28T01:00:00+00:00", "commit": "a" * 40,
    "versions": {"python": "3.11", "torch": "2.14.1", "transformers": "5.24.0"},
    "hardware": {"machine": "x86_64", "cpu": "EPYC", "threads": 16, "gpu": "NVIDIA H100"},
    "setting": {"compiled": False},
    "settings": {
        "base_model": "llava-hf/llava-1.5-7b-hf", "msd_model": "/data/drafts/MSD-LLaVA1.5-7B",
        "data": "x/questions.jsonl", "suite": "mmspec", "subset": "testmini", "limit": None,
        "attn_implementation": "sdpa", "tree": {"depth": 5, "top_k": 10, "total_tokens": 60, "adaptive": False},
        "max_new_tokens": 1024, "temperature": 0.0, "dtype": "auto",
    },
    "others": {}, "baselines": {"autoregressive float16": 40.0}, "phases_ms": {},
    "answers": [logged(number) for number in range(10)],
}  # fmt: skip
"""The keys of a report of `msd bench` that a row needs, and some more."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (PAGE, ROWS, POCKET, "benchmarks/published.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    return tmp_path


def sent(root: Path, **changes: Any) -> Path:
    report = copy.deepcopy(REPORT)
    for name, value in changes.items():
        first, _, second = name.partition("__")
        if second:
            report[first][second] = value
        else:
            report[first] = value
    path = root / "report.json"
    path.write_text(json.dumps(report))
    return path


def test_the_page_has_the_rows_of_its_files(root: Path) -> None:
    assert run(["--check"]) == 0, "run python -m benchmarks.results"
    page = root / PAGE
    page.write_text(page.read_text().replace("| pocket LLaVA |", "| another |"))
    assert run(["--check"], root) == 1
    assert run([], root) == 0 and run(["--check"], root) == 0
    assert page.read_text() == (REPO / PAGE).read_text()


def test_a_report_becomes_one_row_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = sent(root), len(read_rows(root))
    assert run(["add", str(path)], root) == 0
    assert "added: llava-hf/llava-1.5-7b-hf + MSD-LLaVA1.5-7B" in capsys.readouterr().out
    page = (root / PAGE).read_text()
    (line,) = [line for line in page.splitlines() if "MSD-LLaVA1.5-7B" in line and "| mmspec testmini: 10 |" in line]
    identical = "9 of 10 (1 of 1 differ at a near tie)"
    for cell in ("NVIDIA H100", "2.00x", "1.90x [1.80, 2.10]", "3.00", "2.20", identical, "sdpa, tree 5/10/60, up to"):
        assert cell in line
    assert "/data/drafts" not in page
    assert run(["add", str(path)], root) == 0
    assert "already there" in capsys.readouterr().out and (root / PAGE).read_text() == page
    run(["add", str(sent(root, settings__temperature=1.0))], root)
    assert len(read_rows(root)) == before + 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tau": 3.5}, ["tau is not (new_tokens - questions) / cycles", "tau is larger than accepted_per_cycle"]),
        ({"speedup": 2.5}, ["speedup is not the ratio"]),
        ({"identical__answers": 11}, ["more answers than there are"]),
        ({"identical__of": 9, "histogram": {"1": 1}}, ["not the number of questions", "does not count the accepted"]),
        ({"paired_speedup__low": 2.0}, ["outside its interval"]),
        ({"commit": "a" * 40 + "-dirty"}, ["the source had changes"]),
        ({"commit": None}, ["the source had changes"]),
        ({"setting": {"compiled": True}}, ["MSD was compiled and no plain baseline was"]),
        ({"versions": {}, "cycles": 0}, ["versions.torch: Field required", "cycles: Input should be greater than 0"]),
        (
            {"tokens_per_second": {"msd": 160.0, "baseline": 80.0}, "paired_speedup__mean": 2.0},
            ["msd is 160, but the logged answers give 80", "baseline is 80, but", "paired_speedup.mean is 2, but"],
        ),
        (
            {"accepted_per_cycle": 3.0, "identical__answers": 10},
            ["accepted_per_cycle is 3, but", "identical.answers is 10, but the logged answers give 9"],
        ),
        ({"questions": 20, "new_tokens": 320, "identical__of": 20}, ["questions is 20, but", "new_tokens is 320, but"]),
        ({"answers": []}, ["answers: List should have at least 1 item"]),
        ({"answers": [logged(0) | {"accepted": [1]}] * 10}, ["not one number of accepted tokens for each cycle"]),
        ({"answers": [logged(0) | {"accepted": [0] * 10}] * 10}, ["a cycle with more tokens than were accepted"]),
        ({"tau": "3"}, ["tau: Input should be a valid number"]),
    ],
    ids=str,
)
def test_each_fault_is_a_line(
    root: Path, changes: dict[str, Any], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / PAGE).read_bytes(), (root / ROWS).read_bytes()
    path = sent(root, **changes)
    with pytest.raises(UserError, match="nothing was added"):
        run(["add", str(path)], root)
    lines = capsys.readouterr().err.splitlines()
    for text in said:
        assert any(text in line for line in lines), lines
    assert all(line.startswith(f"error: {path}: ") for line in lines)
    assert ((root / PAGE).read_bytes(), (root / ROWS).read_bytes()) == before


def test_another_kind_of_file_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "gpu_check.json").write_text(json.dumps({"parts": [], "hardware": {}}))
    for path, said in (root / "gpu_check.json", "but of gpu_check"), (root / POCKET, "but of suite"):
        with pytest.raises(UserError, match="1 fault, nothing was added"):
            run(["add", str(path)], root)
        assert said in capsys.readouterr().err


def test_a_report_of_msd_bench_has_what_a_row_needs(root: Path, tmp_path: Path) -> None:
    """The real command's report has only the fault that this clone may have changes."""
    from benchmarks.results import faults_of
    from eagle.cli import main

    pocket = REPO / "pocket"
    pair = ["--base-model", str(pocket / "llava"), "--msd-model", str(pocket / "llava-msd"), "--dtype", "float32"]
    data = ["--data", str(pocket / "data" / "heldout.jsonl"), "--limit", "2", "--max-new-tokens", "8", "--warm-up", "0"]
    assert main(["bench", *pair, *data, "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert faults_of({**report, "commit": "a" * 40}) == []
    assert run(["add", str(sent(root, **{**report, "commit": "a" * 40}))], root) == 0


def test_published_figures_name_their_source_and_what_they_count(root: Path) -> None:
    rows = published_rows()
    assert all(row.source and row.checked and (row.tau is not None or row.speedup is not None) for row in rows)
    assert all(row.bonus is not None for row in rows if row.tau is not None)
    rerun = [row for row in rows if row.method == "MSD" and row.set.endswith("723 turns")]
    assert {(row.speedup_of, round(row.speedup or 0, 2)) for row in rerun} == {("totals", 2.11), ("paired", 1.82)}
    assert {row.counted for row in rerun} == {"4.75 with bonus"} and {row.identical for row in rerun} == {0.88}
    path = root / "benchmarks" / "published.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps([{**given[0], "bonus_token": True}]))
    with pytest.raises(UserError, match=r"unknown key 'bonus_token'.*row 1.*bonus"):
        published_rows(path)

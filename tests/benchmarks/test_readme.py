"""The figures of README.md and docs/speed.md: written from a report and compared with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import readme
from llava.errors import UserError

REPO = Path(__file__).resolve().parents[2]
MARKED = "before\n<!-- figures: benchmarks/old.json -->\nfigures\n<!-- end of figures -->\nafter\n"
SPEEDS = {
    "autoregressive": (40.0, 1.0), "autoregressive bfloat16": (30.0, 1.0), "prompt lookup": (42.0, 1.3),
    "assistant": (20.0, 1.4), "msd": (90.0, 5.25), "msd fixed": (80.0, 4.5), "msd 5/10/60": (44.0, 5.5),
}  # fmt: skip


def cell(model: str, temperature: float, **changes: object) -> dict:
    """A cell as `benchmarks.report` writes it, with what README reads."""
    rows = {
        name: {
            "tokens_per_second": speed,
            "speedup": speed / 40,
            "decoding_tokens_per_second": 2 * speed - 30,
            "tau": tau,
            "phases_share": {"cycle": {"draft": 1}},
        }
        for name, (speed, tau) in SPEEDS.items()
    }
    rows["prompt lookup"]["phases_share"] = {}
    rows["prompt lookup"]["tau"] = None
    rows["assistant"]["phases_share"] = {}
    return {
        "model": model, "temperature": temperature, "batch": 1, "context": 0, "new_tokens": 128, "questions": 6,
        "cost_only": False, "doubtful": False, "baseline_name": "autoregressive", "dtype": "float32", "title": "c",
        "results": rows, **changes,
    }  # fmt: skip


def report() -> dict:
    cells = [
        cell(model, temperature) for model in ("pocket-llava", "pocket-qwen2vl") for temperature in (0.0, 1.0)
    ]  # fmt: skip
    other = [{"batch": 4}, {"context": 512}, {"new_tokens": 16}, {"cost_only": True, "model": "random-12M"}]
    return {
        "suite": "pocket", "command": "python -m benchmarks.suite", "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef", "hardware": {"cpu": "A CPU", "cores": 2, "threads": 4},
        "versions": {"torch": "2.1", "transformers": "5.5"}, "settings": {"rounds": 5},
        "cells": [*(cell("pocket-llava", 0.0, **each) for each in other if "model" not in each), *cells,
                  {**cell("random-12M", 0.0), "cost_only": True}],
    }  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a report of the suite and pages that name another one."""
    for folder in ("benchmarks", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "benchmarks" / "pocket.json").write_text(json.dumps(report()))
    for page in readme.PAGES:
        (tmp_path / page).write_text(MARKED, encoding="utf-8")
    return tmp_path


def test_the_pages_have_the_figures_of_their_report() -> None:
    assert readme.run(["--check"]) == 0, "run python -m benchmarks.readme"


def test_lines_of_readme() -> None:
    text = readme.readme_block(report(), "benchmarks/pocket.json")
    head = "|  | pocket LLaVA: tokens/s | τ | speed-up | pocket Qwen2-VL: tokens/s | τ | speed-up |\n"
    assert text.startswith(head + "|---|---:|---:|---:|---:|---:|---:|\n")
    for name, values in (
        ("strongest plain decoding, greedy", "40 |  | *1.00x*"),
        ("best other speculation, greedy", "42 |  | 1.05x"),
        ("**MSD**, greedy", "90 | 5.25 | **2.25x**"),
        ("**MSD**, sampled at T = 1", "90 | 5.25 | **2.25x**"),
    ):
        assert f"| {name} | {values} | {values} |\n" in text
    assert "2026-01-02, A CPU (2 cores, 4 threads), torch 2.1, transformers 5.5, float32 unless named" in text
    assert "[report](benchmarks/pocket.json)" in text and text.count("\n|") == 5


def test_compiled_decoding_has_lines_of_its_own_and_other_baselines() -> None:
    """The strongest way after the first token need not be that of the whole request."""
    given = report()
    for each in given["cells"]:
        rows = each["results"]
        rows["msd compiled"] = {**rows["msd"], "tokens_per_second": 120.0, "speedup": 3.0}
        rows["autoregressive compiled float32"] = {**rows["autoregressive"], "decoding_tokens_per_second": 100.0}
    text = readme.readme_block(given, "benchmarks/pocket.json")
    for how in ("greedy", "sampled at T = 1"):
        assert f"| **MSD**, compiled, {how} | 120 | 5.25 | 3.00x | 120 | 5.25 | 3.00x |\n" in text
    assert "| **MSD** | 90 | 5.25 | **2.25x** | 1.50x |" in readme.speed_block(given, "benchmarks/pocket.json")


def test_tables_of_the_speed_page() -> None:
    text = readme.speed_block(report(), "benchmarks/pocket.json")
    greedy, sampled = text.split("| sampled at T = 1 |")
    assert greedy.startswith(
        "| greedy | pocket LLaVA: tokens/s | τ | speed-up | after the first token |"
        " pocket Qwen2-VL: tokens/s | τ | speed-up | after the first token |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    for rows in (greedy, sampled):
        for name, values in (
            ("our autoregressive loop", "40 |  | *1.00x* | 1.00x"),
            ("our autoregressive loop, bfloat16", "30 |  | 0.75x | 0.60x"),
            ("transformers' prompt lookup", "42 |  | 1.05x | 1.08x"),
            ("**MSD**", "90 | 5.25 | **2.25x** | 3.00x"),
            ("MSD, tree 5/10/60", "44 | 5.50 | 1.10x | 1.16x"),
        ):
            assert f"| {name} | {values} | {values} |\n" in rows
    assert "![speed-up of each way to decode](speed.png)" in text
    assert "5 interleaved rounds of 6 held-out questions, up to 128 new tokens" in text
    assert "`python -m benchmarks.suite`, commit 0123456789ab ([report](../benchmarks/pocket.json))" in text


def test_cells_of_different_runs_say_so() -> None:
    """Days from first to last; command, commit and day of each group."""
    given = report()
    later = {"date": "2026-02-03T00:00:00+00:00", "commit": "fedcba98765432100", "command": "python -m x --only c"}
    readme.chosen(given)[1.0][1].update(later, title="d")
    for text in (readme.speed_block(given, "r.json"), readme.readme_block(given, "r.json")):
        assert "2026-01-02 to 2026-02-03, A CPU" in text
        assert (
            "c: `python -m benchmarks.suite`, commit 0123456789ab, 2026-01-02; "
            "d: `python -m x --only c`, commit fedcba987654, 2026-02-03"
        ) in text


def test_noisy_cells_are_marked_and_missing_contestants_are_empty() -> None:
    given = report()
    shown = readme.chosen(given)[0.0]
    shown[0]["doubtful"] = True
    del shown[1]["results"]["assistant"]
    text = readme.speed_block(given, "r.json")
    assert "| **MSD** | ≈90 | 5.25 | **≈2.25x** | ≈3.00x | 90 | 5.25 | **2.25x** | 3.00x |" in text
    assert "≈: most rounds were noisy." in text
    assert "| transformers' assisted decoding | ≈20 |  | ≈0.50x | ≈0.20x |  |  |  |  |" in text


def test_only_whole_cells_of_one_question_are_shown() -> None:
    shown = readme.chosen(report())
    assert {t: [each["model"] for each in cells] for t, cells in shown.items()} == {
        t: ["pocket-llava", "pocket-qwen2vl"] for t in (0.0, 1.0)
    }
    assert all(each["new_tokens"] == 128 for cells in shown.values() for each in cells)
    with pytest.raises(UserError, match="no cell of one question"):
        readme.chosen({"cells": [cell("m", 0.0, batch=4)]})


def test_another_report_is_named_afterwards(repository: Path) -> None:
    where = ["--repository", str(repository)]
    assert readme.run(["--check", "--report", "benchmarks/pocket.json", *where]) == 1
    assert readme.run(["--report", "benchmarks/pocket.json", *where]) == 0
    for page in readme.PAGES:
        text = (repository / page).read_text(encoding="utf-8")
        assert text.startswith("before\n<!-- figures: benchmarks/pocket.json -->\n| ") and text.endswith("after\n")
    assert Image.open(repository / "docs" / "speed.png").width == 1100
    assert readme.run(["--check", *where]) == 0
    given = report()
    given["cells"][-2]["results"]["msd"]["tokens_per_second"] += 5
    (repository / "benchmarks" / "pocket.json").write_text(json.dumps(given))
    assert readme.run(["--check", *where]) == 1, "a figure has changed"


def test_markers_are_needed(repository: Path) -> None:
    (repository / "README.md").write_text("no table here")
    with pytest.raises(UserError, match="no markers"):
        readme.renewed("README.md", repository)

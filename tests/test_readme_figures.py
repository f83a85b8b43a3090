"""README's figures: written from a report, by a command, and compared with it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import readme
from llava.errors import UserError

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
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
    """A repository with a report of the suite and a README that names another one."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "pocket.json").write_text(json.dumps(report()))
    (tmp_path / "README.md").write_text(MARKED, encoding="utf-8")
    return tmp_path


def test_readme_has_the_figures_of_its_report() -> None:
    assert readme.run(["--check"]) == 0, "run python -m benchmarks.readme"


def test_the_hardware_beside_the_figures_is_that_of_the_report() -> None:
    block = readme.BLOCK.search(README)
    assert block is not None
    given = json.loads((REPO / block[2]).read_text())
    around = (block[4] + README[block.end() :].split("\n## ")[0]).replace("\n", " ")
    machine, versions = given["hardware"], given["versions"]
    facts = [machine["cpu"], f"{machine['cores']} cores", f"torch {versions['torch']}",
             f"transformers {versions['transformers']}", f"]({block[2]})"]  # fmt: skip
    assert [fact for fact in facts if fact not in around] == []


def test_tables_of_the_suite() -> None:
    text = readme.block_of(report(), "benchmarks/pocket.json")
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
    assert "![speed-up of each way to decode](docs/speed.png)" in text
    assert "2026-01-02, A CPU (2 cores, 4 threads), torch 2.1, transformers 5.5, float32 where no dtype" in text
    assert "5 interleaved rounds of 6 held-out questions, answers of up to 128 tokens" in text
    assert "`python -m benchmarks.suite`, commit 0123456789ab ([report](benchmarks/pocket.json))" in text


def test_what_was_disturbed_or_left_out_shows() -> None:
    given = report()
    shown = readme.chosen(given)[0.0]
    shown[0]["doubtful"] = True
    del shown[1]["results"]["assistant"]
    text = readme.block_of(given, "r.json")
    assert "| **MSD** | ≈90 | 5.25 | **≈2.25x** | ≈3.00x | 90 | 5.25 | **2.25x** | 3.00x |" in text
    assert "≈: most rounds were disturbed." in text
    assert "| transformers' assisted decoding | ≈20 |  | ≈0.50x | ≈0.20x |  | | |  |" in text


def test_only_whole_cells_of_one_question_are_shown() -> None:
    shown = readme.chosen(report())
    assert {t: [each["model"] for each in cells] for t, cells in shown.items()} == {
        t: ["pocket-llava", "pocket-qwen2vl"] for t in (0.0, 1.0)
    }
    assert all(each["new_tokens"] == 128 for cells in shown.values() for each in cells)
    with pytest.raises(UserError, match="no cell of one question"):
        readme.chosen({"cells": [cell("m", 0.0, batch=4)]})


def test_another_report_is_named_from_then_on(repository: Path) -> None:
    where = ["--repository", str(repository)]
    assert readme.run(["--check", "--report", "benchmarks/pocket.json", *where]) == 1
    assert readme.run(["--report", "benchmarks/pocket.json", *where]) == 0
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- figures: benchmarks/pocket.json -->\n| greedy |") and text.endswith("after\n")
    assert Image.open(repository / "docs" / "speed.png").width == 1100
    assert readme.run(["--check", *where]) == 0


@pytest.mark.parametrize("change", ["tables", "plot"])
def test_a_changed_figure_is_noticed(repository: Path, change: str) -> None:
    where = ["--repository", str(repository)]
    readme.run(["--report", "benchmarks/pocket.json", *where])
    given = deepcopy(report())
    if change == "tables":
        given["cells"][-2]["results"]["msd"]["tokens_per_second"] += 5
    else:
        given["cells"][0]["title"] = "only the report's checksum is another one"
    (repository / "benchmarks" / "pocket.json").write_text(json.dumps(given))
    assert readme.run(["--check", *where]) == 1
    assert readme.run(where) == 0
    assert readme.run(["--check", *where]) == 0


def test_a_report_of_msd_bench_gives_one_table(repository: Path) -> None:
    given = json.loads((REPO / "benchmarks" / "pocket-llava.json").read_text())
    (repository / "benchmarks" / "old.json").write_text(json.dumps(given))
    assert readme.run(["--repository", str(repository)]) == 0
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert f"| MSD, bfloat16 | 193 | 4.99 | **{given['speedup']:.2f}x** |" in text
    assert not (repository / "docs").exists()


def test_marks_are_needed(repository: Path) -> None:
    with pytest.raises(UserError, match="no marks"):
        readme.renewed("no table here", repository)

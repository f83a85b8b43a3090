"""The experiments start by the commands that the docs quote, and small runs of them give sound figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from experiments.common import REPO, environment
from experiments.training_study import launch

pytestmark = pytest.mark.slow


def run(module: str, *argv: str) -> str:
    """Runs an experiment in the repository; gives what it printed."""
    command = [sys.executable, "-m", f"experiments.{module}", *argv]
    done = subprocess.run(command, env=environment(), cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_every_ablation_gives_the_same_tokens(tmp_path: Path) -> None:
    run("ablations", "--questions", "1", "--max-new-tokens", "16", "--rounds", "1", "--out", str(tmp_path / "a.json"))
    ways = json.loads((tmp_path / "a.json").read_text())["ways"]
    assert len(ways) == 9 and all(way["cycle_ms"] > 0 for way in ways)


@pytest.mark.parametrize(("model", "published"), [("7b", 2.29), ("13b", 2.46)])
def test_no_machine_was_faster_than_its_bandwidth(tmp_path: Path, model: str, published: float) -> None:
    """The roofline alone promises more than was published, and a whole request gains less than decoding alone."""
    run("real_size", "--simulate-only", "--model", model, "--out", str(tmp_path / "r.json"))
    roofline = json.loads((tmp_path / "r.json").read_text())["simulated"]["GPU, roofline"]
    greedy = [row for row in roofline["rows"] if row["temperature"] == 0]
    assert roofline["published_speedup"] == published < max(row["bound"] for row in greedy)
    assert all(row["request"] < row["bound"] for row in roofline["rows"])


def test_costs_of_a_tiny_model_are_measured(tmp_path: Path) -> None:
    run("real_size", "--model", "quick", "--out", str(tmp_path / "r.json"))
    report = json.loads((tmp_path / "r.json").read_text())
    measured = report["measured"]
    assert measured["nodes"][0] == 1 and measured["nodes"][-1] == 60
    assert len(measured["verify_seconds"]) == len(measured["nodes"]) and min(measured["verify_seconds"]) > 0
    assert set(report["simulated"]) == {"cpu, measured", "GPU, roofline", "GPU, with overheads"}


def test_full_logits_take_more_memory(tmp_path: Path) -> None:
    sizes = ["--vocab", "30000", "--positions", "512", "--hidden", "32", "--rounds", "1", "--steps", "1"]
    run("training_cost", *sizes, "--out", str(tmp_path / "cost.json"))
    ways = json.loads((tmp_path / "cost.json").read_text())["ways"]
    logits = 512 * 30000 * 4  # bytes of one [S, V] in float32
    assert ways["full logits"]["peak_bytes"] - ways["masked, in chunks"]["peak_bytes"] > logits


def test_draft_costs(tmp_path: Path) -> None:
    run("draft_head", "--hidden", "128", "--vocabulary", "500", "--keep", "50", "--out", str(tmp_path / "head.json"))
    assert json.loads((tmp_path / "head.json").read_text())["trimmed_seconds"] > 0
    sizes = ["--image-tokens", "8", "300", "--keep", "0", "16", "--rounds", "1"]
    run("visual_context", *sizes, "--out", str(tmp_path / "context.json"))
    records = json.loads((tmp_path / "context.json").read_text())["records"]
    assert [(record["image_tokens"], record["kept"]) for record in records] == [
        (8, 8), (8, 0), (8, 8), (300, 300), (300, 0), (300, 16)]  # fmt: skip


def test_both_ways_of_the_allocation_read_the_same_records(tmp_path: Path) -> None:
    data = REPO / "pocket" / "data"
    out = tmp_path / "a.json"
    words = ["--json-data-path", str(data / "train_v.json"), "--image-data-path", str(data), "--rows", "4"]
    run("allocation", *words, "--shard-size", "2", "--hidden-dtype", "int8", "--out", str(out))
    found = json.loads(out.read_text())
    one, batched = (rate["tokens_per_second"] / rate["samples_per_second"] for rate in found["rates"].values())
    assert found["samples"] == 4 and found["image_tokens"] > 0 and one == pytest.approx(batched)


def test_the_tree_is_drawn(tmp_path: Path) -> None:
    run("figure_tree", "--tree", "2/2/5", "--cycle", "2", "--out", str(tmp_path / "tree.png"))
    run("figure_inputs", "--out", str(tmp_path / "inputs.png"))
    assert Image.open(tmp_path / "tree.png").width == Image.open(tmp_path / "inputs.png").width == 1100


@pytest.mark.by_hand
def test_a_training_study_is_measured_once(tmp_path: Path) -> None:
    words = ["--quick", "--seeds", "0", "--cells", "two-stage", "not-decoupled", "--out", str(tmp_path)]
    run("training_study", *words)
    rows = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [row["cell"] for row in rows] == ["two-stage", "not-decoupled"] and len({row["steps"] for row in rows}) == 1
    assert all(row["tau"] >= 1 and row["tau_chain"] >= 1 and row["speedup"] > 0 for row in rows)
    before = (tmp_path / "two-stage-seed0" / "cell.json").stat().st_mtime_ns
    run("training_study", *words)
    assert (tmp_path / "two-stage-seed0" / "cell.json").stat().st_mtime_ns == before
    assert "Pearson" in run("simulated_tau", "--study", str(tmp_path))


def test_the_loader_reads_every_sample(tmp_path: Path) -> None:
    sizes = ["--shards", "3", "--size", "2", "--hidden", "64", "--tokens", "90", "--images", "8", "--epochs", "2"]
    folder, out = tmp_path / "shards", tmp_path / "l.json"
    run(
        "loader",
        "--folder",
        str(folder),
        *sizes,
        "--hidden-dtype",
        "int8",
        "--workers",
        "2",
        "--reused",
        "--out",
        str(out),
    )
    found = json.loads(out.read_text())
    assert found["samples"] == 6 and len(found["samples_per_second"]) == 2 and len(list(folder.glob("rows-*"))) == 3


def test_attention_in_two_parts_is_measured(tmp_path: Path) -> None:
    sizes = ["--heads", "6", "--key-heads", "2", "--layers", "2", "--nodes", "9", "--contexts", "40,300"]
    run("tree_attention", *sizes, "--rounds", "1", "--out", str(tmp_path / "t.json"))
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["context"] for row in rows] == [40, 300]
    assert all(0 < row["largest_difference"] < 1e-4 and row["two_part"] > 0 for row in rows), "0: the same way twice"


def test_windows_beside_a_busy_process(tmp_path: Path) -> None:
    """Compiled MSD over the strongest of the plain ways, compiled ones among them."""
    flags = ["--loads", "1", "--questions", "8", "--compile", "eager", "--out", str(tmp_path / "n.json")]
    run("neighbour", *flags)
    rows = json.loads((tmp_path / "n.json").read_text())["rows"]
    (row,) = rows
    assert row["load"] == 1 and row["windows"]
    assert row["baseline"] == min(row["plain_ms"], key=lambda name: row["plain_ms"][name])
    assert len(row["plain_ms"]) == 4 and any(name.endswith(", compiled") for name in row["plain_ms"])


def test_kinds_of_drafts_are_trained_once_and_compared(tmp_path: Path) -> None:
    states, out, data = tmp_path / "states", tmp_path / "out", REPO / "pocket" / "data"
    for kind in "tv":
        argv = ["--outdir", str(states / f"hidden_{kind}"), "--model_type", f"llava_v15_{kind}", "--limit", "12"]
        argv += ["--model", str(REPO / "pocket" / "llava"), "--image_data_path", str(data), "--feature-layers", "auto"]
        launch(
            "eagle.ge_data.allocation", [*argv, "--json_data_path", str(data / f"train_{kind}.json")], tmp_path / "log"
        )
    words = ["--hidden", str(states), "--out", str(out), "--steps", "2", "--seeds", "0", "--questions", "1"]
    words += ["--max-new-tokens", "8", "--kinds", *(kinds := ["msd", "eagle3-decoupled", "block", "vispec"])]
    printed = run("draft_kinds", *words)
    for equal in ("steps", "seconds"):
        assert f"llava, equal {equal}" in printed
    rows = json.loads((out / "llava" / "evaluation-seed0.json").read_text())["rows"]
    seconds = json.loads((out / "llava" / "cost.json").read_text())["seconds"]
    whole = {row["kind"]: row for row in rows if "steps" in row["equal"]}
    same_time = {row["kind"]: row for row in rows if "seconds" in row["equal"]}
    assert whole.keys() == set(kinds) and same_time.keys() == whole.keys() == seconds.keys()
    assert all(row["step"] == 2 and row["tau"] >= 1 and row["tau_chain"] >= 1 for row in whole.values())
    assert all(row["identical"] == row["answers"] == 1 and row["after_first_token"] > 0 for row in rows)
    cheapest = min(seconds, key=lambda name: seconds[name])
    assert same_time[cheapest]["step"] == 2 and all(row["step"] <= 2 for row in same_time.values())
    for name, row in same_time.items():
        other = 3 - row["step"]  # of two checkpoints
        gap, wanted = abs(row["seconds"] - 2 * seconds[cheapest]), 2 * seconds[cheapest]
        assert gap <= abs(other * seconds[name] - wanted)
    files = sorted(out.glob("llava/**/*.json"))
    before = [file.stat().st_mtime_ns for file in files if file.name in ("cell.json", "cost.json")]
    (out / "llava" / "evaluation-seed0.json").unlink()
    assert "| block |" in run("draft_kinds", "table", "--out", str(out)), "also without an evaluation"
    run("draft_kinds", "cost", "train", *words)
    assert before == [file.stat().st_mtime_ns for file in files if file.name in ("cell.json", "cost.json")]

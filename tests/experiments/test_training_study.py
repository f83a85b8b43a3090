"""The training study and the comparison of simulated with served acceptance, whole, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import TinySizes, make_image, make_liuhaotian
from tiny_tokenizer import tokenizer_size

from eagle import cli
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.config import DraftConfig
from eagle.ge_data import allocation
from eagle.train import main_deepspeed
from eagle.train.schedule import IMAGE, BatchSizes, Schedule, epoch_items
from eagle.train.settings import TrainConfig
from experiments import simulated_tau, steps, study_report, training_study
from experiments.study_cells import CELLS, REFERENCE, choose, training_config
from llava.errors import UserError, run_cli
from llava.strict import read_strict


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base, its hidden states, held-out questions and configs: what the study is given."""
    folder = tmp_path_factory.mktemp("study")
    base, sizes = make_liuhaotian(folder / "base"), TinySizes()
    make_image(folder / "a.png")
    text = [{"id": str(n), "conversations": said(f"Name {n} rivers.", "The Nile is longer.")} for n in range(10)]
    image = [{"id": str(n), "image": "a.png", "conversations": said("<image>\nWhat?", f"Red, green and {n}.")}
             for n in range(10)]  # fmt: skip
    for kind, rows in (("t", text), ("v", image)):
        (folder / f"{kind}.json").write_text(json.dumps(rows))
        assert not allocation.main([
            "--outdir", str(folder / f"hidden_{kind}"), "--model_type", f"llava_v15_{kind}", "--model", str(base),
            "--image_data_path", str(folder), "--json_data_path", str(folder / f"{kind}.json")])  # fmt: skip
    asked = [{"id": "q0", "images": [], "question": "Text alone?"},
             *({"id": f"q{n}", "images": ["a.png"], "question": f"What is {n}?"} for n in (1, 2, 3))]  # fmt: skip
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    draft = {"model_type": "llava", "hidden_size": sizes.hidden, "intermediate_size": 64, "num_attention_heads": 4,
             "vocab_size": tokenizer_size(), "train": {"learning_rate": 1e-3, "simulated_depth": 3}}  # fmt: skip
    (folder / "draft.json").write_text(json.dumps(draft))
    (folder / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
    return {"folder": folder, "base": base}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps run in this process, without importing torch anew each time; gives the modules that were started."""
    started: list[str] = []

    def launch(module: str, argv: list[str], log: Path) -> None:
        started.append(module)
        if module == "eagle.cli":
            assert cli.main(argv) == 0
            return
        monkeypatch.setattr(sys, "argv", [module, *argv])
        assert run_cli(main_deepspeed.main) == 0

    monkeypatch.setattr(steps, "launch", launch)
    monkeypatch.setattr(training_study, "launch", launch)
    return started


def call(monkeypatch: pytest.MonkeyPatch, module: Any, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
    return run_cli(module.main)


def arguments(world: dict[str, Path], out: Path, *more: str) -> list[str]:
    folder = world["folder"]
    return ["--quick", "--base", str(world["base"]), "--data", str(folder), "--heldout", str(folder / "heldout.jsonl"),
            "--config", str(folder / "draft.json"), "--deepspeed-config", str(folder / "ds.json"), "--out", str(out),
            *more]  # fmt: skip


def test_a_study_is_measured_once_and_compared(world, here, tmp_path, monkeypatch, capsys):
    cells = ("--seeds", "0", "--cells", "two-stage", "not-decoupled")
    assert call(monkeypatch, training_study, *arguments(world, tmp_path, *cells)) == 0
    assert here == ["eagle.train.main_deepspeed", "eagle.cli"] * 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"date", "commit", "hardware", "versions"} <= set(results)
    rows = results["cells"]
    assert [(row["cell"], row["seed"]) for row in rows] == [("two-stage", 0), ("not-decoupled", 0)]
    assert {row["steps"] for row in rows} == {4} and all(row["questions"] == 2 for row in rows)
    assert all(row["tau"] >= 1 and row["tau_chain"] >= 1 and row["speedup"] > 0 for row in rows)
    assert load_draft(tmp_path / "not-decoupled-seed0" / "checkpoints" / "final").config.options.decoupled is False
    asked = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in asked] == ["q1", "q2"]
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") == 2 and "| two-stage |" in table
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

    before = (tmp_path / "two-stage-seed0" / "cell.json").read_bytes()
    (tmp_path / "not-decoupled-seed0" / "cell.json").unlink()
    here.clear()
    assert call(monkeypatch, training_study, *arguments(world, tmp_path, *cells)) == 0
    assert here == [] and (tmp_path / "two-stage-seed0" / "cell.json").read_bytes() == before
    (tmp_path / "not-decoupled-seed0" / "cell.json").unlink()
    (tmp_path / "not-decoupled-seed0" / "bench.json").unlink()
    assert call(monkeypatch, training_study, *arguments(world, tmp_path, *cells)) == 0
    assert here == ["eagle.cli"], "the training was there, only its measurement was missing"

    here.clear()
    assert call(monkeypatch, simulated_tau, "--study", str(tmp_path)) == 0
    assert here == ["eagle.cli"], "one earlier checkpoint was kept, of the first run"
    record = json.loads((tmp_path / "simulated_tau.json").read_text())
    assert [(point["run"], point["step"]) for point in record["points"]] == [
        ("not-decoupled-seed0", 4), ("two-stage-seed0", 2), ("two-stage-seed0", 4)]  # fmt: skip
    final = {f"{row['cell']}-seed{row['seed']}": row for row in rows}
    for point in record["points"]:
        if point["step"] == 4:
            assert point["simulated"] == final[point["run"]]["simulated_tau"]["image"]
            assert point["tau_chain"] == final[point["run"]]["tau_chain"]
    assert set(record["correlation"]) == {"chain", "tree"}
    assert (tmp_path / "simulated_tau.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    assert call(monkeypatch, training_study, *arguments(world, tmp_path, "--questions", "1")) == 2
    assert "the study here had questions=2, this one has 1" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_in_processes_of_their_own(world, tmp_path, monkeypatch):
    assert call(monkeypatch, training_study, *arguments(world, tmp_path, "--cells", "text-only", "--seeds", "3")) == 0
    log = (tmp_path / "text-only-seed3" / "log.txt").read_text()
    assert "trained: " in log and "questions" in log


def test_a_failed_step_shows_its_end(tmp_path, capsys):
    with pytest.raises(UserError, match=r"json\.tool ended with status [12].*log\.txt"):
        steps.launch("json.tool", [str(tmp_path / "absent")], tmp_path / "log.txt")
    assert "absent" in capsys.readouterr().err


def test_cells_differ_in_what_they_say_and_share_the_rest():
    base = {"model_type": "llava", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
            "vocab_size": 40, "train": {"rollout_steps": 3, "noise": 0.05}}  # fmt: skip
    shared = {"epochs": 4, "text_share": 0.5, "seed": 1}
    configs = {cell.name: training_config(base, cell, shared) for cell in CELLS}
    train = {name: read_strict(TrainConfig, config.pop("train"), name) for name, config in configs.items()}
    assert {name: each.rollout_steps for name, each in train.items() if each.rollout_steps > 1} == {
        "two-stage-k2": 2, "two-stage-k3": 3}  # fmt: skip
    assert {(each.epochs, each.seed, each.noise) for each in train.values()} == {(4, 1, 0.05)}
    decoupled = {name: DraftConfig.from_dict(config).options.decoupled for name, config in configs.items()}
    assert [name for name, value in decoupled.items() if not value] == ["not-decoupled"]

    plans = {name: Schedule.plan(BatchSizes(4, 1, 1), 30, 20, each) for name, each in train.items()}
    assert len({plan.total_steps for plan in plans.values()}) == 1, "every training has the same number of steps"
    pictures = {}
    for name, each in train.items():
        epochs = (epoch_items(plans[name], e, each.text_share, 0, each.image_start, each.image_end) for e in range(4))
        pictures[name] = [sum(item.source == IMAGE for item in items) for items in epochs]
    assert pictures == {
        "two-stage": [0, 0, 10, 20], "not-decoupled": [0, 0, 10, 20], "text-only": [0] * 4, "image-only": [20] * 4,
        "mixed": [10] * 4, "two-stage-k2": [0, 0, 10, 20], "two-stage-k3": [0, 0, 10, 20]}  # fmt: skip


def test_a_table_has_means_and_ranges_over_seeds():
    rows = [
        {
            "cell": "mixed",
            "what": "w",
            "seed": seed,
            "base": "b",
            "steps": 4,
            "questions": 2,
            "tau": tau,
            "tau_chain": 1.5,
            "speedup": 2.0,
            "simulated_tau": {"image": tau},
        }
        for seed, tau in ((0, 2.0), (1, 3.0))
    ]
    made = {"date": "2026-01-02T03:04:05", "commit": None, "versions": {},
            "hardware": {"cpu": "c", "cores": 2, "threads": 2}}  # fmt: skip
    line = study_report.table(rows, made).splitlines()[2]
    assert (
        line == "| mixed | w | 0, 1 | 2.50 (2.00 to 3.00) | 1.50 (1.50 to 1.50) | 2.00 (2.00 to 2.00) | "
        "2.50 (2.00 to 3.00) |  |"
    )


def test_cells_are_chosen_by_name():
    assert choose([]) == list(CELLS) and choose(["two-stage"]) == [REFERENCE]
    with pytest.raises(UserError, match="no cell 'two_stage'"):
        choose(["two_stage"])


def test_correlation_of_ranks_knows_ties_and_constants():
    found = [{"simulated": s, "tau_chain": c, "tau_tree": 3.0} for s, c in ((1.0, 2.0), (2.0, 3.0), (3.0, 9.0))]
    values = simulated_tau.correlations(found)
    assert values["chain"]["spearman"] == pytest.approx(1.0) and values["chain"]["pearson"] < 0.99
    assert values["tree"] == {"pearson": 0.0, "spearman": 0.0, "served_minus_simulated": 1.0}
    assert simulated_tau.ranks(simulated_tau.np.array([3.0, 1.0, 3.0])).tolist() == [1.5, 0.0, 1.5]

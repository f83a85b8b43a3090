"""Statistics of a run as numbers and as a table, and the speed-up over a baseline."""

from __future__ import annotations

import json

import pytest
import torch
from eval_support import IMAGES, TREE, load, request
from rich.console import Console

from eagle import Stats
from eagle.provenance import cpu_name
from llava import UserError
from lmms_eval_msd import report
from lmms_eval_msd.model import LlavaMSD
from lmms_eval_msd.report import load_baseline

SETTINGS = {"use_msd": True, "base": "b", "draft": "d", "dtype": "float32", "tree": None, "processes": 1}
CPU = torch.device("cpu")


def stats(accepted, requests, seconds):
    """As the engine counts: each cycle gives the accepted tokens and one more, a prompt's first token comes before."""
    cycles = len(accepted)
    new = sum(accepted) + cycles + requests
    return Stats(new, cycles, requests, seconds, list(accepted), [8] * cycles)


def test_numbers():
    built = report.build({"a": stats([2, 0, 1], 2, 2.0), "b": stats([3], 1, 1.0)}, SETTINGS, CPU)
    row = built["tasks"]["a"]
    assert (row["answers"], row["tokens"], row["cycles"], row["tau"], row["tokens_per_second"]) == (2, 8, 3, 2.0, 4.0)
    assert row["histogram"] == {"0": 1, "1": 1, "2": 1}
    assert row["acceptance_by_position"] == pytest.approx([2 / 3, 1 / 3])
    assert built["total"]["tau"] == pytest.approx((8 + 5 - 3) / 4)
    assert "speedup" not in row
    assert json.loads(json.dumps(built)) == built


def write_results(folder, tasks, **changes):
    """Results of a plain run with one token a second less than nothing special."""
    rows = {task: {"tokens_per_second": speed} for task, speed in tasks.items()}
    plain = SETTINGS | {"use_msd": False, "tasks": rows, "total": {"tokens_per_second": 2.0}, **changes}
    folder.mkdir()
    (folder / "1_results.json").write_text(json.dumps({"results": {}, "msd": plain}))
    return folder / "1_results.json"


def test_speedup(tmp_path):
    parts = {"a": stats([2, 0, 1], 2, 2.0), "b": stats([3], 1, 1.0)}
    whole = load_baseline(write_results(tmp_path / "whole", {"a": 2.0, "b": 2.5}, hardware=cpu_name()))
    built = report.build(parts, SETTINGS, CPU, whole)
    assert [row["speedup"] for row in built["tasks"].values()] == [2.0, 2.0]
    assert built["total"]["speedup"] == pytest.approx(13 / 3 / 2.0)
    assert built["baseline"] == {"results": str(tmp_path / "whole" / "1_results.json"), "differences": {}}
    part = load_baseline(write_results(tmp_path / "part", {"a": 2.0}, hardware="other"))
    built = report.build(parts, SETTINGS, CPU, part)
    assert [row["speedup"] for row in built["tasks"].values()] == [2.0, None]
    assert built["total"]["speedup"] is None
    assert built["baseline"]["differences"] == {"hardware": ["other", cpu_name()]}


def test_table(tmp_path, capsys, monkeypatch):
    baseline = load_baseline(write_results(tmp_path / "whole", {"a": 2.0}, hardware="other").parent)
    built = report.build({"a": stats([2, 0, 1], 2, 2.0)}, SETTINGS, CPU, baseline)
    console = Console(width=160)
    with console.capture() as text:
        console.print(report.table(built))
    assert "2.00x" in text.get()
    assert "speed-up" in text.get()
    monkeypatch.setenv("COLUMNS", "80")
    report.show(built)
    shown = capsys.readouterr().out
    assert "differs in hardware: other" in shown
    assert "a, accepted at position 1, 2, ...: 0.67 0.33" in shown.splitlines()
    assert max(len(line) for line in shown.splitlines() if "differs" not in line) <= 80


def test_baseline_that_is_none(tmp_path, base, draft):
    with pytest.raises(UserError, match="no results"):
        load_baseline(tmp_path)
    path = write_results(tmp_path / "msd", {}, use_msd=True)
    with pytest.raises(UserError, match="speculative"):
        load_baseline(path)
    path.write_text('{"results": {}}')
    with pytest.raises(UserError, match="without decoding statistics"):
        load(LlavaMSD, base, draft, msd_baseline=str(path))


def test_model_reports_its_speedup(base, draft, tmp_path):
    path = write_results(tmp_path / "plain", {"tiny": 1e-6})
    model = load(LlavaMSD, base, draft, msd_baseline=str(path), **TREE)
    model.generate_until([request("How many?", IMAGES[:1])])
    model.clean()
    assert model.report["tasks"]["tiny"]["speedup"] > 1
    assert model.report["baseline"]["differences"]["base"] == ["b", str(base)]
    assert model.report["batch_size"] == 1


def test_report_of_an_unsaved_run_is_not_another_models(tmp_path, capsys):
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    report.publish(report.build({"a": stats([2], 1, 1.0)}, SETTINGS, CPU))
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_source = "dummy"
    tracker.general_config_tracker.model_name_sanitized = "dummy"
    tracker.save_results_aggregated(results={"results": {}}, samples={}, datetime_str="a")
    assert "msd" not in json.loads((tmp_path / "dummy" / "a_results.json").read_text())
    assert "MSD decoding" not in capsys.readouterr().out

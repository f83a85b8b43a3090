"""Statistics of a run as numbers and as a table, and the speed-up over a baseline."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from eval_support import IMAGES, TREE, load, request
from rich.console import Console

from eagle import Stats
from eagle.benchmark import baselines
from eagle.provenance import cpu_name
from llava import UserError
from lmms_eval_msd import report
from lmms_eval_msd.model import LlavaMSD
from lmms_eval_msd.report import load_baseline
from lmms_eval_msd.turns import Timed

SETTINGS = {"use_msd": True, "base": "b", "draft": "d", "dtype": "float32", "tree": None, "processes": 1}
CPU = torch.device("cpu")


def timed(parts):
    """Each task's statistics as one batch."""
    return [Timed(task, tuple(range(part.requests)), part) for task, part in parts.items()]


def stats(accepted, requests, seconds):
    """As the engine counts: each cycle gives the accepted tokens and one more, a prompt's first token comes before."""
    cycles = len(accepted)
    new = sum(accepted) + cycles + requests
    return Stats(new, cycles, requests, seconds, list(accepted), [8] * cycles)


def test_numbers():
    built = report.build(timed({"a": stats([2, 0, 1], 2, 2.0), "b": stats([3], 1, 1.0)}), SETTINGS, CPU)
    row = built["tasks"]["a"]
    assert (row["answers"], row["tokens"], row["cycles"], row["tau"], row["tokens_per_second"]) == (2, 8, 3, 2.0, 4.0)
    assert row["histogram"] == {"0": 1, "1": 1, "2": 1}
    assert row["acceptance_by_position"] == pytest.approx([2 / 3, 1 / 3])
    assert built["total"]["tau"] == pytest.approx((8 + 5 - 3) / 4)
    assert "speedup" not in row
    assert json.loads(json.dumps(built)) == built


def write_results(folder, tasks, **changes):
    """Results of a plain run: batches of each task as (documents, tokens, seconds, seconds to the first token)."""
    rows = {task: {"tokens_per_second": 2.0} for task in tasks}
    names = ("docs", "tokens", "seconds", "first_token")
    batches = {task: [dict(zip(names, batch, strict=True)) for batch in each] for task, each in tasks.items()}
    chosen = {"name": "generate", "chosen_from": [{"generate": 2.0, "loop": 1.0}], "differences": {}}
    plain = SETTINGS | {"use_msd": False, "tasks": rows, "total": {"tokens_per_second": 2.0}}
    plain |= {"batches": batches, "baseline": chosen, **changes}
    folder.mkdir()
    (folder / "1_results.json").write_text(json.dumps({"results": {}, "msd": plain}))
    return folder / "1_results.json"


def test_speedup(tmp_path, capsys):
    """Of totals and of each batch: task a has two batches of 4 tokens, plain in 4 and 8 seconds, by MSD in 2 each."""
    parts = [Timed("a", (number,), stats([1, 0], 1, 2.0)) for number in (0, 1)] + [Timed("b", (0,), stats([3], 1, 1.0))]
    plain = {"a": [([0], 4, 4.0, 1.0), ([1], 4, 8.0, 2.0)], "b": [([0], 5, 2.0, 1.0)]}
    whole = load_baseline(write_results(tmp_path / "whole", plain, hardware=cpu_name()))
    built = report.build(parts, SETTINGS, CPU, whole)
    row, other = built["tasks"]["a"], built["tasks"]["b"]
    assert (row["speedup"], row["paired_speedup"]["mean"], other["speedup"]) == (3.0, 3.0, 2.0)
    later = row["after_first_token"]
    assert later["speedup"] == pytest.approx((6 / 4) / (6 / 9))
    assert later["paired_speedup"]["mean"] == pytest.approx(((3 / 2) / (3 / 3) + (3 / 2) / (3 / 6)) / 2)
    assert later["baseline_name"] == built["baseline"]["name"] == "generate"
    assert built["total"]["speedup"] == pytest.approx((13 / 5) / (13 / 14))
    assert built["baseline"]["results"] == str(tmp_path / "whole" / "1_results.json")
    assert built["baseline"]["differences"] == {}
    part = load_baseline(write_results(tmp_path / "part", {"a": plain["a"], "b": []}, hardware="other"))
    built = report.build(parts, SETTINGS, CPU, part)
    assert [row["speedup"] for row in built["tasks"].values()] == [3.0, None]
    assert built["total"]["speedup"] is None, "not all batches have a plain time"
    assert built["baseline"]["differences"] == {"hardware": ["other", cpu_name()]}
    report.show(built)
    shown = capsys.readouterr().out
    assert "b, no speed-up: the baseline decoded other requests" in shown and "a, no speed-up" not in shown


def test_table(tmp_path, capsys, monkeypatch):
    plain = {"a": [([0, 1], 8, 4.0, 1.0)]}
    baseline = load_baseline(write_results(tmp_path / "whole", plain, hardware="other").parent)
    built = report.build(timed({"a": stats([2, 0, 1], 2, 2.0)}), SETTINGS, CPU, baseline)
    console = Console(width=160)
    with console.capture() as text:
        console.print(report.table(built))
    assert "2.00x" in text.get()
    assert "speed-up" in text.get()
    monkeypatch.setenv("COLUMNS", "80")
    report.show(built)
    shown = capsys.readouterr().out
    assert "differs in hardware: other" in shown
    assert "strongest plain decoding: generate" in shown and "generate 2.0, loop 1.0" in shown
    assert "a, tokens per verification: 2.00 with the bonus token, 1.00 without" in shown
    assert "a, whole requests: totals 2.00x, mean of requests 2.00x" in shown
    assert "a, accepted at position 1, 2, ...: 0.67 0.33" in shown.splitlines()
    assert max(len(line) for line in shown.splitlines() if "differs" not in line) <= 80


def test_baseline_that_is_none(tmp_path, base, draft):
    with pytest.raises(UserError, match="no results"):
        load_baseline(tmp_path)
    path = write_results(tmp_path / "msd", {}, use_msd=True)
    with pytest.raises(UserError, match="speculative"):
        load_baseline(path)
    path = write_results(tmp_path / "alone", {}, batches=None)
    found = json.loads(path.read_text())
    del found["msd"]["batches"]
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"did not look for the strongest.*--msd_baseline measure"):
        load_baseline(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="results file is not a JSON object"):
        load_baseline(path)
    path.write_text('{"results": {}, "msd": {"tasks": {}}}')
    with pytest.raises(UserError, match="without decoding statistics"):
        load_baseline(path)
    path.write_text('{"results": {}}')
    with pytest.raises(UserError, match="without decoding statistics"):
        load(LlavaMSD, base, draft, msd_baseline=str(path))


def test_a_run_without_a_decoded_answer_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(report.logger, "warning", said.append)
    report.publish(report.build([], SETTINGS, CPU))
    (line,) = said
    assert "no answer was decoded" in line


def slower(monkeypatch, name, seconds):
    """The plain way of this name takes so many seconds more for each answer."""

    def ways(models, settings, compiled=None):
        found = baselines(models, settings, compiled)
        for way in found:
            if way.name.startswith(name):
                way.answer = partial(delayed, way.answer)
        return found

    def delayed(answer, work):
        answered = answer(work)
        answered.stats.seconds += seconds
        return answered

    monkeypatch.setattr("lmms_eval_msd.turns.baselines", ways)


@pytest.mark.parametrize("weak", ["autoregressive", pytest.param("transformers generate", marks=pytest.mark.slow)])
def test_the_strongest_plain_way_is_the_baseline(base, draft, tmp_path, monkeypatch, weak):
    """Chosen on two of three requests, beside MSD and in a plain run; the plain run is a baseline of a third one."""
    slower(monkeypatch, weak, 1000.0)
    strong = ({"autoregressive float32", "transformers generate float32"} - {f"{weak} float32"}).pop()
    texts, short = ("How many?", "Which?", "Where?"), {"max_new_tokens": 8}
    requests = [request(text, IMAGES[:1], number, short) for number, text in enumerate(texts)]
    model = load(LlavaMSD, base, draft, msd_baseline="measure", msd_baseline_requests="2", **TREE)
    plain = load(LlavaMSD, base, msd_baseline="measure", msd_baseline_requests="2")
    answers = [[each.text for each in each_model.generate_until(requests)] for each_model in (model, plain)]
    assert answers[0] == answers[1]
    for each in (model, plain):
        assert [way.name for way in each.turns.plain] == [strong] and len(each.turns.plain[0].rounds) == 3
        each.clean()
        assert each.report["baseline"]["name"] == strong and each.report["baseline_requests"] == 2
        (speeds,) = each.report["baseline"]["chosen_from"]
        assert max(speeds, key=speeds.get) == strong and len(speeds) == 2
    row = model.report["tasks"]["tiny"]
    assert row["identical"] == {"answers": 3, "of": 3}
    assert row["speedup"] == row["tokens_per_second"] / row["baseline_tokens_per_second"]
    assert row["paired_speedup"]["mean"] > 0 and row["after_first_token"]["baseline_name"] == strong
    assert plain.report["tasks"]["tiny"]["tau"] == 1.0 and "speedup" not in plain.report["tasks"]["tiny"]
    assert [batch["docs"] for batch in plain.report["batches"]["tiny"]] == [[0], [1], [2]]
    (tmp_path / "1_results.json").write_text(json.dumps({"results": {}, "msd": plain.report}))
    later = load(LlavaMSD, base, draft, msd_baseline=str(tmp_path), **TREE)
    later.generate_until(requests)
    later.clean()
    row, before = later.report["tasks"]["tiny"], plain.report["tasks"]["tiny"]
    assert row["speedup"] == pytest.approx(row["tokens_per_second"] / before["tokens_per_second"])
    assert later.report["baseline"]["name"] == strong and later.report["baseline"]["differences"] == {}


def test_compiled_msd_is_not_compared_with_a_baseline_that_was_not(base, draft, tmp_path, monkeypatch):
    plain = {"a": [([0], 4, 4.0, 1.0)]}
    path = write_results(tmp_path / "plain", plain)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(UserError, match="MSD is compiled, and plain decoding of the baseline was not"):
        load(LlavaMSD, base, draft, msd_baseline=str(path), compile="eager")
    chosen = {"name": "loop, compiled", "chosen_from": [{"loop": 1.0, "loop, compiled": 2.0}], "differences": {}}
    path = write_results(tmp_path / "compiled", plain, baseline=chosen)
    assert load(LlavaMSD, base, draft, msd_baseline=str(path), compile="eager").msd.compiled


def test_plain_ways_end_at_the_tasks_texts_too(base):
    """In a batch and alone, with a text of the task and one of the checkpoint, which the padding request does not wait
    for."""
    plain = load(LlavaMSD, base)
    text = plain.generate_until([request("How many?", IMAGES[:1])])[0].text
    model = load(LlavaMSD, base, msd_baseline="measure", batch_size=2)
    model.msd.target.stop_strings = ("nothing of this",)
    stop = next(each for each in text if each.isascii() and each.isalpha())
    short = {"until": [stop]}
    requests = [request(ask, IMAGES[:1], number, short) for number, ask in enumerate(("How many?", "Which?", "Where?"))]
    requests.append(request("How many?", IMAGES[:1], 9, short, __padding_only__=True))
    answers = [each.text for each in model.generate_until(requests)]
    assert answers[0] == answers[3] == text[: text.index(stop)]
    ours, theirs = model.turns.plain
    assert ours.answers == theirs.answers and len(ours.answers) == 3
    assert len(ours.answers[0]) < len(ours.answers[1]), "the other one of the batch did not end with it"
    assert [stats.new_tokens for stats in ours.rounds] == [stats.new_tokens for stats in theirs.rounds]


def test_report_of_an_unsaved_run_is_not_another_models(tmp_path, capsys):
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    report.publish(report.build(timed({"a": stats([2], 1, 1.0)}), SETTINGS, CPU))
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_source = "dummy"
    tracker.general_config_tracker.model_name_sanitized = "dummy"
    tracker.save_results_aggregated(results={"results": {}}, samples={}, datetime_str="a")
    assert "msd" not in json.loads((tmp_path / "dummy" / "a_results.json").read_text())
    assert "MSD decoding" not in capsys.readouterr().out

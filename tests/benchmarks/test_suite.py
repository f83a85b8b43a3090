"""The benchmark suite: what it declares, how it judges its rounds, and one run of its smallest file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_llava import make_image, make_liuhaotian

from benchmarks import suite
from benchmarks.assistant import first_layers
from benchmarks.contestants import build
from benchmarks.random_pair import RandomPrompt, Shape, random_pair
from benchmarks.spec import CONTESTANTS, Cell, Suite, read_suite
from benchmarks.work import positions_of, work_of
from eagle import MSDModel
from eagle.families import load_target
from llava.errors import UserError

REPO = Path(__file__).resolve().parents[2]
DTYPES = {"float32", "bfloat16"}
TINY = Shape(hidden=32, layers=4, heads=2, intermediate=48, vocabulary=128, positions=512)


def write(folder: Path, **changes: object) -> Path:
    given = {"name": "x", "models": {"m": {"random": {}}}, "cells": [{"name": "c", "model": "m"}], **changes}
    path = folder / "suite.json"
    path.write_text(json.dumps(given))
    return path


def test_lists_are_combined(tmp_path: Path) -> None:
    cells = [{"name": "c", "model": "m", "temperature": [0, 1], "batch": [1, 4], "new_tokens": 16}]
    found = read_suite(write(tmp_path, cells=cells)).cells
    assert [(cell.temperature, cell.batch, cell.new_tokens) for cell in found] == [
        (0, 1, 16), (0, 4, 16), (1, 1, 16), (1, 4, 16),
    ]  # fmt: skip
    assert len({cell.title for cell in found}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": 3}, "unknown key 'round'.*did you mean 'rounds'"),
        ({"cells": []}, "no cells"),
        ({"cells": [{"name": "c", "model": "m", "tokens": 3}]}, "unknown key 'cells.0.tokens'"),
        ({"cells": [{"name": "c"}]}, "lacks 'cells.0.model'"),
        ({"cells": [{"name": "c", "model": "other"}]}, "'other', which is not declared"),
        ({"cells": [3]}, "cells.0=3.*give an object"),
        ({"models": {"m": {}}}, "'base' and 'draft', or 'random'"),
    ],
)
def test_a_wrong_suite_file_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_suite(write(tmp_path, **changes))


def test_compiled_msd_counts_from_compiled_plain_decoding() -> None:
    model = random_pair(TINY, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"compiled MSD and no compiled plain decoding.*add 'autoregressive compiled'"):
        model.backend = "eager"  # as the default is on CUDA
        build(Cell("c", "m", new_tokens=4, contestants=("transformers dynamic", "msd")), Suite("x", {}, ()), model)
    runners, _ = build(Cell("c", "m", contestants=("autoregressive", "msd")), Suite("x", {}, ()), model)
    assert len(runners) == 2


@pytest.mark.parametrize("name", ["pocket", "long"])
def test_cells_of_single_questions_have_compiled_baselines(name: str) -> None:
    for cell in read_suite(REPO / "benchmarks" / "suites" / f"{name}.json").cells:
        if cell.batch == 1 and "batches" not in cell.name:
            assert {"autoregressive compiled", "msd compiled"} <= set(cell.contestants), cell.title


@pytest.mark.parametrize("name", ["pocket", "quick"])
def test_the_suites_here_are_readable(name: str) -> None:
    found = read_suite(REPO / "benchmarks" / "suites" / f"{name}.json")
    named = {contestant for cell in found.cells for contestant in cell.contestants}
    assert {"autoregressive", "transformers dynamic", "assistant", "msd", "msd fixed", "msd 5/10/60"} <= named
    for pair in found.models.values():
        assert pair.random or ((REPO / str(pair.base)).is_dir() and (REPO / str(pair.draft)).is_dir())


def test_first_layers_share_weights_and_are_the_same_function() -> None:
    """The assistant's hidden states are the target's after its first layers, the norm included."""
    model = random_pair(TINY, torch.float32, torch.device("cpu")).target.model
    small = first_layers(model, "2")
    assert small.get_output_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert model.config.text_config.num_hidden_layers == len(model.model.language_model.layers) == 4
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = model.model.language_model.norm(states[2])
        assert torch.equal(small.model(input_ids=ids).last_hidden_state, expected)
    with pytest.raises(UserError, match="assistant of '4' layers"):
        first_layers(model, "4")


@pytest.mark.parametrize(
    "names",
    [
        ("autoregressive", "transformers static", "prompt lookup", "assistant", "msd", "msd 2/2/6"),
        pytest.param(("autoregressive", "autoregressive compiled", "msd 2/2/6 compiled"), marks=pytest.mark.slow),
    ],
    ids=["eager", "compiled"],
)
def test_contestants_answer_alike(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, in float32, on a random pair: nobody's speculation changes an answer. Plain ways run in each dtype."""
    model = random_pair(TINY, torch.float32, torch.device("cpu"))
    made = Suite("x", {}, (), assistant="layers:1")
    monkeypatch.setattr("benchmarks.contestants.BACKEND", "eager")  # torch.compile without its code generator
    runners, left_out = build(Cell("c", "m", new_tokens=8, contestants=names), made, model, [model])
    answers = {runner.name: runner.answer(RandomPrompt(40)) for runner in runners}
    plain = {name for name in names if name.startswith(("autoregressive", "transformers"))}
    others = {f"{name} float32" for name in plain}
    assert set(answers) == {*names, *others} and not left_out
    assert {runner.name for runner in runners if runner.plain} == plain | others
    assert {len(answer.tokens[0]) for answer in answers.values()} == {8}
    assert all(answer.tokens == answers["autoregressive"].tokens for answer in answers.values())
    assert all(0 < answer.stats.first_token < answer.stats.seconds for answer in answers.values())


def test_a_batch_leaves_out_what_cannot_take_one() -> None:
    model = random_pair(TINY, torch.float32, torch.device("cpu"))
    runners, left_out = build(Cell("c", "m", batch=2, new_tokens=4, contestants=CONTESTANTS), Suite("x", {}, ()), model)
    assert set(left_out) == {"prompt lookup", "assistant", "msd fixed"}
    dynamic = next(runner for runner in runners if runner.name == "transformers dynamic")
    answer = dynamic.answer(RandomPrompt(20, batch=2))
    assert (answer.stats.requests, answer.stats.new_tokens) == (2, 8)
    large = Cell("c", "m", batch=17, contestants=("autoregressive", "msd compiled"))
    assert "more than 16" in build(large, Suite("x", {}, ()), model)[1]["msd compiled"]


@pytest.mark.by_hand  # minutes
@pytest.mark.slow
def test_compiled_contestants_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_pair(TINY, torch.float32, torch.device("cpu"))
    monkeypatch.setattr("benchmarks.contestants.BACKEND", "eager")
    names = ("autoregressive", "autoregressive compiled", "msd", "msd compiled", "msd 2/2/6 compiled")
    runners, left_out = build(Cell("c", "m", batch=3, new_tokens=8, contestants=names), Suite("x", {}, ()), model)
    answers = [runner.answer(RandomPrompt(20, batch=3)).tokens for runner in runners]
    assert not left_out and len(answers) == 5 and all(answer == answers[0] for answer in answers)
    assert [runner.plain for runner in runners] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("names", "message"),
    [(("msd",), "no plain baseline"), (("autoregressive", "msd 3/4"), "no contestant"), (("medusa",), "no contestant")],
)
def test_unknown_contestants_are_refused(names: tuple[str, ...], message: str) -> None:
    model = random_pair(TINY, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        build(Cell("c", "m", contestants=names), Suite("x", {}, ()), model)


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m benchmarks.suite --quick`: one table, one plot, one JSON with all that is needed to repeat it."""
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    assert suite.run(["--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "quick.json").read_text())
    assert (tmp_path / "quick.png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "date", "commit", "hardware", "versions", "settings"} <= set(report)
    random, pocket = report["cells"]
    assert random["cost_only"] and not pocket["cost_only"] and {random["dtype"], pocket["dtype"]} <= DTYPES
    assert set(pocket["results"]) == {
        "autoregressive", "transformers dynamic", "transformers static", "prompt lookup", "assistant", "msd",
        "msd fixed", "msd 5/10/60",
    }  # fmt: skip
    assert pocket["results"][pocket["baseline_name"]]["speedup"] == 1.0
    assert all(len(row["seconds"]) == pocket["rounds"] == 2 for row in pocket["results"].values())
    shares = pocket["results"]["msd"]["phases_share"]["cycle"]
    assert {"verify", "outside"} <= set(shares) and sum(shares.values()) == pytest.approx(1.0)
    out = capsys.readouterr().out
    assert "costs only" in out and "share of a cycle" in out


def suite_of(folder: Path, *names: str, **changes: object) -> Path:
    cells = [{"name": name, "model": "m", "questions": 1, "contestants": ["autoregressive", "msd"]} for name in names]
    shape = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 48, "vocabulary": 128, "positions": 512}
    return write(folder, cells=cells, models={"m": {"random": shape}}, rounds=1, warm_up=0, **changes)


def test_other_cells_of_a_report_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some cells replace those of an earlier report, also of one without records of each cell; --missing runs the rest;
    other settings are refused; a run of all cells begins a new report."""
    measured: list[str] = []

    def measure(cell: Cell, made: Suite, models: object) -> dict[str, object]:
        measured.append(cell.name)
        row = {"speedup": 1.0, "tokens_per_second": 1.0, "spread": 0.0, "first_token_ms": 1.0, "tau": None}
        row |= {"decoding_tokens_per_second": 1.0, "phases_share": {}, "answers_that_differ": 0}
        more = {"rounds": made.rounds, "noisy_rounds": [], "doubtful": False, "cost_only": True, "left_out": {}}
        return {"title": cell.title, "baseline_name": "a", "results": {"a": row}, "run": len(measured), **more}

    monkeypatch.setattr(suite, "measure", measure)
    monkeypatch.setattr("benchmarks.plot.draw", lambda report, path: None)
    monkeypatch.setattr("eagle.provenance.source_commit", lambda: f"commit{len(measured)}")
    path, out = suite_of(tmp_path, "one", "two", "three"), tmp_path / "out"
    argv = ["--suite", str(path), "--out", str(out)]

    def ran(*more: str) -> tuple[list[str], list[tuple[int, str]]]:
        measured_before = len(measured)
        assert suite.run([*argv, *more]) == 0
        cells = json.loads((out / "x.json").read_text())["cells"]
        return measured[measured_before:], [(cell["run"], cell["commit"]) for cell in cells]

    assert ran("--only", "two") == (["two"], [(1, "commit0")])
    report = json.loads((out / "x.json").read_text())
    assert report["cells"][0]["command"] == report["command"] and report["cells"][0]["date"] >= report["date"]
    for key in ("date", "commit", "command"):  # as an older version wrote it
        del report["cells"][0][key]
    (out / "x.json").write_text(json.dumps(report))
    assert ran("--only", "one") == (["one"], [(2, "commit1"), (1, "commit0")])
    assert ran("--only", "o", "--missing") == ([], [(2, "commit1"), (1, "commit0")])
    assert ran("--missing") == (["three"], [(2, "commit1"), (1, "commit0"), (3, "commit2")])
    assert ran("--only", "two") == (["two"], [(2, "commit1"), (4, "commit3"), (3, "commit2")])
    capsys.readouterr()
    suite.run([*argv, "--missing"])
    assert "commit commit1, commit3, commit2" in capsys.readouterr().out
    before = (out / "x.json").read_bytes()
    with pytest.raises(UserError, match=r"settings\.rounds was 1, is 2: .*x.json \(another --out\)") as error:
        suite.run([*argv, "--only", "one", "--rounds", "2"])
    assert "\n" not in str(error.value) and (out / "x.json").read_bytes() == before
    assert ran() == (["one", "two", "three"], [(5, "commit4"), (6, "commit4"), (7, "commit4")])
    report = json.loads((out / "x.json").read_text())
    report["cells"][1]["questions"], report["cells"][2]["questions"] = 1, 5  # as declared, and as it was before
    (out / "x.json").write_text(json.dumps(report))
    assert ran("--missing") == (["three"], [(5, "commit4"), (6, "commit4"), (8, "commit7")])
    (out / "x.json").write_text(json.dumps({**report, "cells": [{"name": "one"}]}))
    with pytest.raises(UserError, match="a cell of the report has no title"):
        suite.run([*argv, "--missing"])
    (out / "x.json").write_text('{"steps": [], "validations": []}')
    with pytest.raises(UserError, match="not a report of the suite"):
        suite.run([*argv, "--missing"])


def test_a_stopped_run_leaves_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out, measure = suite_of(tmp_path, "one", "two"), tmp_path / "out", suite.measure

    def stopping(cell: Cell, *rest: object) -> dict[str, object]:
        if cell.name == "two" and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return measure(cell, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(suite, "measure", stopping)
    monkeypatch.setattr("benchmarks.plot.draw", lambda report, path: None)
    argv = ["--suite", str(path), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        suite.run(argv)
    first = json.loads((out / "x.json").read_text())["cells"]
    (tmp_path / "again").touch()
    assert suite.run([*argv, "--missing"]) == 0
    cells = json.loads((out / "x.json").read_text())["cells"]
    assert [cell["name"] for cell in cells] == ["one", "two"] and cells[:1] == first


def test_list_and_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.run(["--list", "--only", "random"]) == 0
    assert capsys.readouterr().out.count("random weights:") == 3
    with pytest.raises(UserError, match="has 'nothing' in its name"):
        suite.run(["--only", "nothing"])


def test_sixteen_bit_is_no_baseline_on_a_cpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.device.cpu_has_bfloat16", lambda: False)
    asked = [("bfloat16", "cpu"), ("float32", "cpu"), ("bfloat16", "cuda:0")]
    assert [suite.too_slow(*each) for each in asked] == [True, False, False]


def test_a_context_is_filled_up_with_pictures(tmp_path: Path) -> None:
    """Further pictures come before the question's own; a context that the model cannot hold is refused."""
    base = make_liuhaotian(tmp_path / "base")
    model = MSDModel(load_target(base, dtype=torch.float32))
    rows = []
    for number in range(3):
        make_image(tmp_path / f"{number}.png", seed=number)
        rows.append({"id": str(number), "images": [f"{number}.png"], "question": "Which?", "answer": ""})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = Suite("x", {}, (), data=str(tmp_path / "questions.jsonl"))
    cells = [Cell("c", "m", 2, context=context, new_tokens=4) for context in (0, 150)]
    short, long = (work_of(cell, made, model, random=False) for cell in cells)
    assert len(short) == len(long) == 2
    for before, after in zip(short, long, strict=True):
        assert positions_of(before, model) < 150 <= positions_of(after, model)
        assert after.images[-1] == before.images[0] and len(after.images) > 1
    with pytest.raises(UserError, match=r"needs \d+ positions, the model has"):
        work_of(Cell("c", "m", 1, new_tokens=10**6), made, model, False)
    with pytest.raises(UserError, match="3 questions are fewer than a batch of 4"):
        work_of(Cell("c", "m", 4, batch=4), made, model, False)

"""``--eval-data``: questions are answered by the decoding loop during training, which stays the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from online_support import Case
from safetensors.torch import load_file

from eagle.cli import main as msd
from eagle.decode.msd import MSDModel
from eagle.decode.self_check import self_check
from eagle.families import family_named
from eagle.ge_data import extract
from eagle.questions import read_questions
from eagle.train import main_deepspeed, served
from llava.errors import run_cli


def train(case: Case, monkeypatch: pytest.MonkeyPatch, cpdir: str, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", case.command(cpdir, *flags))
    return run_cli(main_deepspeed.main)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    made = Case("llava", tmp_path)
    rows = [{"id": "a", "images": ["pictures/a.png"], "question": "What colours?", "source": "colours"},
            {"id": "b", "question": "Name a river."}, {"id": "c", "question": "Never asked."}]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


EVALUATE = ["--eval-every", "2", "--eval-limit", "2", "--eval-length", "16"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["online", "stored"])
def test_training_is_the_same_with_evaluations(
    case: Case, monkeypatch: pytest.MonkeyPatch, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if way == "stored":
        case.allocate()
    source = getattr(case, way)
    flags = ["--eval-data", str(case.folder / "q.jsonl"), *EVALUATE]

    def drawing(*given: Any, **settings: Any) -> Any:
        """Loading that uses the global random state."""
        torch.rand(7)
        return load_draft(*given, **settings)

    load_draft = served.load_draft
    monkeypatch.setattr(served, "load_draft", drawing)
    assert train(case, monkeypatch, "without", *source) == 0
    assert train(case, monkeypatch, "with", *source, *flags) == 0
    ours, theirs = (case.history(name) for name in ("with", "without"))
    for row in (*ours["steps"], *theirs["steps"]):
        row.pop("samples_per_second")
    assert ours["steps"] == theirs["steps"] and ours["validations"] == theirs["validations"]
    weights = [load_file(case.folder / name / "final" / "model.safetensors") for name in ("with", "without")]
    assert all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())
    newest = max(path for path in (case.folder / "with").glob("step-*"))
    states = [torch.load(case.folder / name / newest.name / "state" / "random-000.pt")["cpu"] for name in
              ("with", "without")]  # fmt: skip
    assert states[0].equal(states[1])
    check_evaluations(case, ours, capsys)


def check_evaluations(case: Case, history: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """They are there at every second step and at the last, and the last one is what the final draft does."""
    last = history["steps"][-1]["step"]
    steps = [row["step"] for row in history["served"]]
    assert steps == sorted({*range(2, last + 1, 2), last}) and len(steps) > 2
    newest = history["served"][-1]
    assert [each["id"] for each in newest["answers"]] == ["a", "b"]
    model = MSDModel.from_pretrained(case.base, case.folder / "with" / "final", tree="fixed")
    outputs = [model.generate(**question.inputs(model.target), temperature=0.0, max_new_tokens=16)
               for question in read_questions(case.folder / "q.jsonl", 2)]  # fmt: skip
    for output, answer in zip(outputs, newest["answers"], strict=True):
        assert [token for cycle in answer["cycles"] for token in cycle] == output.tokens[0]
        assert answer["accepted"] == output.stats.accept_lengths
    assert newest["tau"] == (sum(len(o.tokens[0]) for o in outputs) - 2) / sum(o.stats.cycles for o in outputs)
    assert f"step {last}: decoding 2 questions: tau {newest['tau']:.2f} (simulated: " in capsys.readouterr().out
    page = (case.folder / "with" / "training.html").read_text()
    assert page.count("<svg") == 2 and page.count("<details") == 2 and "<script" not in page
    assert list((case.folder / "with").glob(".tmp-*")) == [], "the draft that was evaluated is removed"
    assert msd(["report", str(case.folder / "with" / "training.json"), "--json", str(case.folder / "r.json")]) == 0
    found = json.loads((case.folder / "r.json").read_text())["comparisons"]
    assert [each["rows"][0] for each in found if each["measure"] == "τ"] == ["step 2, MSD"] * (len(steps) - 1)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_evaluations(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*case.online, "--eval-data", str(case.folder / "q.jsonl"), *EVALUATE]
    assert train(case, monkeypatch, "whole", *flags) == 0
    assert train(case, monkeypatch, "parts", *flags, "--max-steps", "3") == 0
    assert train(case, monkeypatch, "parts", *flags, "--resume") == 0
    whole, parts = ([(row["step"], row["tau"]) for row in case.history(name)["served"]] for name in ("whole", "parts"))
    assert whole == parts


def test_a_base_that_the_engine_does_not_read_exactly_is_not_evaluated_with(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on stored states, which were made elsewhere."""
    case.allocate()
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extract, "self_check", self_check)
    kind = family_named(case.family).target_class()
    right = kind.prompt_positions
    monkeypatch.setattr(kind, "prompt_positions", lambda *given: (right(*given)[0] * 2, right(*given)[1] * 2))
    flags = [*case.stored, "--eval-data", str(case.folder / "q.jsonl"), *EVALUATE, "--max-steps", "1"]
    assert train(case, monkeypatch, "wrong", *flags) == 2
    assert "logits of the engine differ" in capsys.readouterr().err
    assert train(case, monkeypatch, "unchecked", *flags, "--no-self-check") == 0


def test_settings_of_an_evaluation_without_questions_are_refused(
    arguments: Any, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("ck", "--eval-every", "5")) == 2
    assert "eval_every=5 without questions: --eval-data (name a question file)" in capsys.readouterr().err
    assert run(arguments("ck", "--eval-data", "nowhere.jsonl")) == 2
    assert "question file cannot be read" in capsys.readouterr().err

"""Flags of the target's own answers: what is refused, and what a resume must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corpus_support import Write, regenerate, text_record
from tiny_draft import make_draft

from eagle.ge_data import allocation
from eagle.hidden_states.index import load_index
from llava.errors import run_cli

REFUSED = {
    "temperature 0.0 instead of 0.5": ["--temperature", "0.5"],
    "max_new_tokens 8 instead of 13": ["--max-new-tokens", "13"],
    "msd_model None instead of 'draft'": ["--msd-model"],
    "seed 42 instead of 1": ["--seed", "1"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_resume_with_other_settings_is_refused(
    llava: Any, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    data, out = annotations([text_record(n) for n in range(4)]), tmp_path / "out"
    assert regenerate(llava, data, out, "t", "--limit", "1") == 0
    more = REFUSED[message] + ([str(llava.draft)] if REFUSED[message] == ["--msd-model"] else [])
    assert regenerate(llava, data, out, "t", *more) == 2
    assert f"error: the folder was begun with {message}" in capsys.readouterr().err
    assert load_index(out).samples == 1


def test_answers_of_both_kinds_do_not_mix(
    llava: Any, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = annotations([text_record(n) for n in range(4)]), tmp_path / "out"
    assert regenerate(llava, data, out, "t", "--limit", "1") == 0
    flags = ["--outdir", str(out), "--model_type", "llava_v15_t", "--model", str(llava.folder), "--gpus", "cpu"]
    assert run_cli(lambda: allocation.main([*flags, "--dtype", "float32", "--json_data_path", str(data)])) == 2
    assert "begun with regenerate True instead of False" in capsys.readouterr().err


def test_another_draft_of_the_same_name_is_refused(
    llava: Any, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = annotations([text_record(n) for n in range(4)]), tmp_path / "out"
    assert regenerate(llava, data, out, "t", "--limit", "1", "--msd-model", str(llava.draft)) == 0
    other = make_draft(tmp_path / "draft", llava, seed=9)
    assert regenerate(llava, data, out, "t", "--msd-model", str(other)) == 2
    assert "another model or draft, with regeneration" in capsys.readouterr().err


WRONG = {
    "--msd-model is for the model's own answers": ["--msd-model", "x"],
    "--temperature is for the model's own": ["--temperature", "0"],
    "--max-new-tokens is for the model's own": ["--max-new-tokens", "9"],
    "--at-once is for the model's own": ["--at-once", "2"],
    "temperature -1.0": ["--regenerate", "--temperature", "-1"],
    "temperature nan": ["--regenerate", "--temperature", "nan"],
    "draft not found": ["--regenerate", "--msd-model", "./nothing"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_flags_are_one_line(
    llava: Any, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    flags = ["--outdir", str(tmp_path / "out"), "--model_type", "llava_v15_t", "--model", str(llava.folder)]
    flags += ["--json_data_path", str(annotations([text_record(1)])), "--gpus", "cpu", *WRONG[message]]
    assert run_cli(lambda: allocation.main(flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_draft_that_does_not_fit_is_named(
    llava: Any, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = make_draft(tmp_path / "wide", llava, hidden_size=64)
    assert regenerate(llava, annotations([text_record(1)]), tmp_path / "out", "t", "--msd-model", str(wide)) == 2
    assert "the draft does not fit the base model: hidden size 64" in capsys.readouterr().err

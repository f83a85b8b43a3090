"""Training without stored hidden states: the losses are those of training on stored ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from online_support import FAMILIES, LENGTH, Case, annotations
from train_support import make_sample

from eagle.decode.self_check import self_check
from eagle.families.registry import family_named
from eagle.ge_data import extract
from eagle.hidden_states.shards import ShardDataset
from eagle.train import main_deepspeed, online
from eagle.train.collate import collate
from eagle.train.online import OnlineReader, Processes, UsableRecords
from eagle.train.trainer import Trainer
from llava.errors import run_cli


class Killed(BaseException):
    """Ends a run as a signal would: no handler of errors sees it."""


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    def call(argv: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", argv)
        return run_cli(main_deepspeed.main)

    return call


def test_losses_are_those_of_stored_states(case: Case, run: Callable[[list[str]], int]) -> None:
    """States of a float32 base are rounded to 16 bit on both ways, by the same line of `Reader`; batches differ."""
    case.allocate()
    assert run(case.command("stored", *case.stored)) == 0
    assert run(case.command("online", *case.online)) == 0
    expected, found = case.curve("stored"), case.curve("online")
    assert len(expected) == len(found) == 8 and len(set(expected)) == 8
    assert found == pytest.approx(expected, abs=1e-4)
    for one, other in zip(case.history("stored")["validations"], case.history("online")["validations"], strict=True):
        for kind in ("text", "image"):
            assert other["results"][kind]["loss"] == pytest.approx(one["results"][kind]["loss"], abs=1e-4)
    about = json.loads((case.folder / "online" / "final" / "provenance.json").read_text())["data"]
    assert about["image"]["online"] is True and about["image"]["samples"] == len(ShardDataset(case.folder / "v"))


def test_a_base_that_the_engine_does_not_read_exactly_is_refused(
    case: Case, run: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The draft would learn wrong states in silence. Here the positions are wrong."""
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extract, "self_check", self_check)
    kind = family_named(case.family).target_class()
    right = kind.prompt_positions
    monkeypatch.setattr(kind, "prompt_positions", lambda *given: (right(*given)[0] * 2, right(*given)[1] * 2))
    assert run(case.command("wrong", *case.online)) == 2
    assert "logits of the engine differ" in capsys.readouterr().err and not (case.folder / "wrong").exists()
    assert run(case.command("wrong", *case.online, "--no-self-check", "--max-steps", "1")) == 0
    assert run(case.command("stored", *case.stored, "--no-self-check")) == 2
    assert "--no-self-check is for training with --online" in capsys.readouterr().err


def test_killed_and_resumed_gives_the_same_losses(
    case: Case, run: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between two checkpoints without a word; the resumed run takes the rows that the first one found."""
    if not (case.folder / "online").exists():
        assert run(case.command("online", *case.online)) == 0
    step = Trainer._step

    def killed(trainer: Trainer, batches: Any, epoch: int) -> None:
        if trainer.progress.step == 5:
            raise Killed
        step(trainer, batches, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(Killed):
            run(case.command("killed", *case.online))
    monkeypatch.setattr(online, "find_usable", lambda *_: pytest.fail("rows are known"))
    assert run(case.command("killed", *case.online, "--resume")) == 0
    assert case.curve("killed") == pytest.approx(case.curve("online"), abs=1e-6)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llava", tmp_path_factory.mktemp("flags"))


def test_rows_that_cannot_be_used_are_listed(llava: Case, run: Callable[[list[str]], int], capsys: Any) -> None:
    assert run(llava.command("listed", *llava.online, "--max-steps", "1", "--max-length", "2048")) == 0
    out = capsys.readouterr().out
    assert "11 records, skipped: 1 missing_picture" in out and "10 records, skipped: 1 empty" in out
    assert out.count("--max-length 2048: the model has 512 positions") == 2
    record = json.loads((llava.folder / "listed" / "rows-image.json").read_text())
    assert [(row["id"], row["reason"]) for row in record["skipped"]] == [("lost", "missing_picture")]
    assert len(record["usable"]) == 11
    before = (llava.folder / "listed" / "rows-image.json").read_bytes()
    other = llava.folder / "other.json"
    other.write_text(json.dumps(annotations()[:12]))
    flags = [*llava.online, "--annotations_v", str(other), "--max-length", "2048"]
    assert run(llava.command("listed", *flags)) == 2
    assert "has checkpoints of an earlier run" in capsys.readouterr().err
    assert run(llava.command("listed", *flags, "--resume")) == 2
    assert "the interrupted run had image=9, this one has 5" in capsys.readouterr().err
    assert (llava.folder / "listed" / "rows-image.json").read_bytes() == before


def test_rows_are_prepared_by_several_threads(llava: Case, run: Callable[[list[str]], int]) -> None:
    few = ["--epochs", "1", "--limit", "6", "--text-share", "0"]
    assert run(llava.command("alone", *llava.online, *few)) == 0
    assert run(llava.command("helped", *llava.online, *few, "--workers", "3")) == 0
    assert llava.curve("helped") == pytest.approx(llava.curve("alone"), abs=1e-6)


def test_a_picture_that_vanishes_is_named(llava: Case, run: Callable[[list[str]], int], capsys: Any) -> None:
    assert run(llava.command("gone", *llava.online, "--max-steps", "1", "--text-share", "0")) == 0
    moved = llava.folder / "pictures"
    shutil.move(moved / "a.png", llava.folder / "a.png")
    try:
        assert run(llava.command("gone", *llava.online, "--text-share", "0", "--resume")) == 2
    finally:
        shutil.move(llava.folder / "a.png", moved / "a.png")
    assert "is no longer usable (missing_picture)" in capsys.readouterr().err


def test_states_that_are_not_finite_count_nothing() -> None:
    good, bad = make_sample(9, image=2, seed=1), make_sample(9, image=2, seed=2)
    bad = replace(bad, hidden=bad.hidden.clone().index_fill_(0, torch.tensor([3]), float("inf")))

    class Fixed:
        def read(self, pieces: Any) -> Any:
            return pieces

    (samples,) = OnlineReader(Fixed())([[good, bad]])  # type: ignore[arg-type,list-item]
    batch = collate(samples, 40, 64)
    assert batch.loss_mask[0].any() and not batch.loss_mask[1].any()
    assert batch.inputs.isfinite().all() and torch.equal(batch.hidden[0], good.hidden)


def test_processes_share_the_rows(monkeypatch: pytest.MonkeyPatch, llava: Case, tmp_path: Path) -> None:
    """Two processes find what one finds; the main one's record is everyone's."""
    from eagle.families import load_target, template_of
    from eagle.ge_data.selection import Selection

    template = template_of(load_target(llava.base, dtype="float32"))
    selection = Selection.of(llava.rows, "image", llava.folder / "pictures", LENGTH, 42)
    alone = UsableRecords(tmp_path / "one", "image", False).usable(selection, template, {}, Processes())
    parts = [online.find_usable(selection, template, Processes(rank, 2)) for rank in (0, 1)]
    answers = iter([[None, None], parts])
    monkeypatch.setattr(Processes, "gather", lambda self, part: next(answers))
    assert UsableRecords(tmp_path / "two", "image", False).usable(selection, template, {}, Processes(0, 2)) == alone
    assert len(alone) == 11 and sum(map(len, parts)) == 1
    first, second = ((tmp_path / name / "rows-image.json").read_text() for name in ("one", "two"))
    assert first == second


WRONG = [
    ("--online --tmpdir_t x", "--tmpdir_t is for training without --online"),
    ("--tmpdir_t x --image-folder y", "--image-folder is for training with --online"),
    ("", "no data"),
    ("--online", "no data"),
    ("--online --annotations_t nothing.json", "annotation file cannot be read"),
    ("--online --annotations_v ROWS --image-folder nowhere", "no folder of pictures"),
    ("--online --annotations_t ROWS --model_type qwen2_vl", "a model of family qwen2_vl, this is llava"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_bad_input(llava: Case, run: Callable[[list[str]], int], capsys: Any, flags: str, message: str) -> None:
    given = [str(llava.rows) if flag == "ROWS" else flag for flag in flags.split()]
    assert run(llava.command("wrong", *given)) == 2
    assert message in capsys.readouterr().err
    assert not (llava.folder / "wrong").exists()


def test_no_usable_row(llava: Case, run: Callable[[list[str]], int], capsys: Any) -> None:
    rows = llava.folder / "mute.json"
    rows.write_text(json.dumps([annotations()[-1]]))
    assert run(llava.command("mute", "--online", "--annotations_t", str(rows))) == 2
    assert "every record was skipped" in capsys.readouterr().err


def test_a_set_on_another_hidden_size_is_refused_before_anything_is_loaded(
    llava: Case, run: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(online, "load_base", lambda *_, **__: pytest.fail("loaded"))
    config = json.loads((llava.folder / "draft.json").read_text())
    (llava.folder / "narrow.json").write_text(json.dumps({**config, "hidden_size": 16}))
    assert run([*llava.command("narrow", *llava.online), "--config", str(llava.folder / "narrow.json")]) == 2
    assert "and hidden size 16, the base has" in capsys.readouterr().err


def test_online_flags_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_deepspeed.parse_args(["--help"])
    assert "--annotations_v FILE" in capsys.readouterr().out

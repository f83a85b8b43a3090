"""Whole runs of the command in one process, resumed after a stop or a kill."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from train_support import SCRIPT, assert_same_curve, curve, environment, logged, write_corpus

from eagle.drafts.checkpoint import load_draft
from eagle.families.base_weights import load_base_tensors
from eagle.train.checkpoint import CheckpointStore, Progress, replace_folder
from eagle.train.schedule import BatchSizes, Schedule
from eagle.train.settings import TrainConfig
from llava.errors import UserError


def test_a_run_leaves_a_published_checkpoint_and_its_record(arguments, run, tmp_path, capfd):
    assert run(arguments("ck", validation_share=0.2, keep_last=1)) == 0
    out = capfd.readouterr().out
    assert "10 text and 8 image samples for training, 8 an epoch" in out
    assert "2 an epoch x 4 epochs = 8" in out and "trained: " in out
    folder = tmp_path / "ck"
    assert {p.name for p in folder.iterdir()} == {
        ".msd.lock", "step-00000008", "best", "final", "latest", "training.json", "training.png",
        "training.html", "tensorboard",
    }  # fmt: skip
    assert (folder / "latest").read_text().strip() == "step-00000008"
    config = json.loads((folder / "final" / "config.json").read_text())
    assert "train" not in config and config["num_hidden_layers"] == 1
    for name in ("best", "final", "step-00000008"):
        provenance = json.loads((folder / name / "provenance.json").read_text())
        assert {"commit", "command", "versions", "data", "settings", "date"} <= set(provenance)
        assert provenance["data"]["image"]["samples"] == 10 and provenance["settings"]["epochs"] == 4
        assert provenance["step"] <= provenance["total_steps"] == 8
    draft = load_draft(folder / "final")
    base = torch.load(folder / "step-00000008" / "state" / "engine.pt", weights_only=True)["objective"]
    torch.testing.assert_close(draft.fc.weight, base["draft.fc.weight"].bfloat16())
    history = json.loads((folder / "training.json").read_text())
    assert [row["image_probability"] for row in history["steps"]] == [0, 0, 0, 0, 0.5, 0.5, 1, 1]
    assert [set(row["results"]) for row in history["validations"]] == [{"text", "image"}] * 4
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_has_no_frozen_parameters_and_older_ones_are_resumed(arguments, run, tmp_path):
    """Older ones have the embedding too. One without a trained weight is damaged."""
    tracker = ("--tracker", "none")
    assert run(arguments("whole", *tracker)) == 0
    assert run(arguments("parts", *tracker, "--max-steps", "4")) == 0
    step = tmp_path / "parts" / "step-00000004"
    file = step / "state" / "engine.pt"
    state = torch.load(file, weights_only=True)
    assert "draft.fc.weight" in state["objective"] and "draft.embed_tokens.weight" not in state["objective"]
    embedding = load_base_tensors(tmp_path / "base").embed.float()
    older = {**state["objective"], "draft.embed_tokens.weight": embedding}
    broken = {name: tensor for name, tensor in older.items() if name != "draft.fc.weight"}
    torch.save({**state, "objective": broken}, file)
    assert run(arguments("parts", *tracker, "--resume")) == 2
    torch.save({**state, "objective": older}, file)
    assert run(arguments("parts", *tracker, "--resume")) == 0
    assert_same_curve(tmp_path / "whole", tmp_path / "parts")


def same_weights(folder, one, other):
    """Whether two checkpoints of runs in ``folder`` have equal weights, up to rounding."""
    pair = [load_draft(folder / name).state_dict() for name in (one, other)]
    return all(torch.allclose(pair[0][name], pair[1][name], atol=1e-5) for name in pair[0])


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 5, 6))])
def test_stopped_at_any_step_and_resumed_gives_the_same_losses(arguments, run, tmp_path, stop, log_every):
    tracker = ("--tracker", "none")
    assert run(arguments("whole", *tracker, log_every=log_every)) == 0
    assert run(arguments("parts", *tracker, "--max-steps", str(stop), log_every=log_every)) == 0
    assert same_weights(tmp_path, "parts/final", f"parts/step-{stop:08d}")
    assert run(arguments("parts", *tracker, "--resume", log_every=log_every)) == 0
    assert [step for step, _ in curve(tmp_path / "parts")] == ([3, 6, 8] if log_every == 3 else list(range(1, 9)))
    assert_same_curve(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_losses(arguments, run, tmp_path, capsys):
    """SIGKILL in the middle of a longer run, at whatever step it happens to be."""
    settings = {"epochs": 100, "save_every": 3, "validate_every": 50, "log_every": 4}  # of two steps each
    assert run(arguments("whole", "--tracker", "none", **settings)) == 0
    command = [sys.executable, str(SCRIPT), *arguments("killed", "--tracker", "none", **settings)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 500
    while not (tmp_path / "killed" / "latest").exists():
        assert process.poll() is None, "it ended by itself"
        assert time.time() < deadline, "it saves nothing"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final").exists(), "it ended before it was killed"
    (tmp_path / "killed" / ".tmp-step-00000099").mkdir(exist_ok=True)  # as if killed while writing
    capsys.readouterr()
    assert run(arguments("killed", "--tracker", "none", "--resume", **settings)) == 0
    resumed = int(re.search(r"resumed after step (\d+)", capsys.readouterr().out).group(1))
    assert 0 < resumed < 200 and resumed % 3 == 0
    assert [step for step, _ in curve(tmp_path / "killed")] == list(range(4, 201, 4))
    assert_same_curve(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".tmp-*"))


def test_checkpoints_by_time(arguments, run, tmp_path, monkeypatch, capsys):
    """A minute passes until each log: one at the log at which three minutes are over, and one at the end."""
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("eagle.train.trainer.time", SimpleNamespace(monotonic=lambda: next(clock)))
    settings = {"save_minutes": 3, "log_every": 2, "keep_last": 9}
    assert run(arguments("ck", "--tracker", "none", **settings)) == 0
    assert [path.name for path in sorted((tmp_path / "ck").glob("step-*"))] == ["step-00000006", "step-00000008"]
    assert run(arguments("both", "--save-every", "2", **settings)) == 2
    assert "save_every=2 and save_minutes=3 (give one of them)" in capsys.readouterr().err


def test_a_checkpoint_without_the_sums_since_the_last_log_can_go_on(arguments, run, tmp_path):
    """As runs wrote them before the sums were kept."""
    assert run(arguments("old", "--tracker", "none", "--max-steps", "2", log_every=4)) == 0
    file = tmp_path / "old" / "step-00000002" / "state" / "random-000.pt"
    state = torch.load(file, weights_only=True)
    assert state.pop("meter")["steps"] == 2
    torch.save(state, file)
    assert run(arguments("old", "--tracker", "none", "--resume", log_every=4)) == 0
    assert [step for step, _ in curve(tmp_path / "old")] == [4, 8]


@pytest.mark.parametrize(
    "stop", [pytest.param(2, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow), None, 4]
)
@pytest.mark.parametrize(("taus", "best"), [((2, 3, 1, 2.5), 4), ((2, 1, 1.5, 3), 8)])
def test_best_is_the_draft_with_the_highest_tau(arguments, run, tmp_path, monkeypatch, taus, best, stop):
    """Validated after steps 2, 4, 6 and 8, in one go or resumed; the mean over both sets counts."""
    results = iter([tau + side for tau in taus for side in (1.5, -1.5)])

    def validated(engine, batches):
        return {"loss": 1.0, "top1": 0.5, "top3": 0.5, "tau": next(results), "accept_at": []}

    monkeypatch.setattr("eagle.train.trainer.validate", validated)
    settings = {"validate_every": 2, "save_every": 2, "keep_last": 9, "validation_share": 0.2}
    if stop is not None:
        assert run(arguments("ck", "--tracker", "none", "--max-steps", str(stop), **settings)) == 0
    assert run(arguments("ck", "--tracker", "none", "--resume", **settings)) == 0
    saved = {
        step: (tmp_path / "ck" / f"step-0000000{step}" / "model.safetensors").read_bytes() for step in (2, 4, 6, 8)
    }
    assert len(set(saved.values())) == 4
    assert (tmp_path / "ck" / "best" / "model.safetensors").read_bytes() == saved[best]
    progress = json.loads((tmp_path / "ck" / "step-00000008" / "progress.json").read_text())
    assert progress["best"] == 3 and next(results, None) is None


@pytest.mark.slow
def test_more_epochs_after_the_end(arguments, run, tmp_path, capsys):
    """The further epochs are those of a longer run: samples, noise, rate. Stopped in them, it resumes as ever."""
    quiet = ("--tracker", "none", "--resume")
    still = {"learning_rate": 0.0, "text_share": 0.25, "validate_every": 99}  # so that losses tell samples and noise
    for name, epochs in (("long", 4), ("grown", 3), ("grown", 4)):
        assert run(arguments(name, *quiet, epochs=epochs, **still)) == 0
    assert len(curve(tmp_path / "grown")) == 8
    for grown, whole in zip(curve(tmp_path / "grown")[6:], curve(tmp_path / "long")[6:], strict=True):
        assert grown == pytest.approx(whole)
    assert run(arguments("once", *quiet, epochs=2)) == 0
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    assert run(arguments("once", *quiet, epochs=4)) == 0
    for limit in ("5", "0"):
        assert run(arguments("twice", *quiet, "--max-steps", limit, epochs=4)) == 0
    assert_same_curve(tmp_path / "once", tmp_path / "twice")
    assert same_weights(tmp_path, "once/final", "twice/final") and not same_weights(
        tmp_path, "once/final", "long/final"
    )
    whole = Schedule.plan(BatchSizes(2, 2, 1), 11, 9, TrainConfig(epochs=4, learning_rate=1e-3))
    rows = logged(tmp_path / "once")[4:]
    assert [row["learning_rate"] for row in rows] == pytest.approx([whole.learning_rate(step) for step in range(4, 8)])
    assert [row["image_probability"] for row in rows] == [0.5, 0.5, 1, 1]
    capsys.readouterr()
    assert run(arguments("once", *quiet, epochs=3)) == 2
    assert "the interrupted run had epochs=4, this one has 3" in capsys.readouterr().err


def test_hidden_states_in_8_bit_train_as_those_in_16_bit(arguments, run, tmp_path):
    text = write_corpus(tmp_path / "text8", 12, hidden_dtype="int8")
    image = write_corpus(tmp_path / "image8", 10, image=3, seed=100, hidden_dtype="int8")
    assert run(arguments("wide", "--tracker", "none")) == 0
    assert run(arguments("narrow", "--tracker", "none", "--tmpdir_t", str(text), "--tmpdir_v", str(image))) == 0
    wide, narrow = curve(tmp_path / "wide"), curve(tmp_path / "narrow")
    assert [step for step, _ in narrow] == list(range(1, 9)) and narrow != wide
    for (_, expected), (_, got) in zip(wide, narrow, strict=True):
        assert got == pytest.approx(expected, rel=0.005)
    provenance = json.loads((tmp_path / "narrow" / "final" / "provenance.json").read_text())
    assert provenance["data"]["text"]["hidden_dtype"] == "int8"


def test_errors_are_one_line(arguments, run, tmp_path, capsys):
    def error(argv):
        assert run(argv) == 2
        return capsys.readouterr().err

    assert run(arguments("ck", "--tracker", "none", "--max-steps", "1")) == 0
    assert "has checkpoints of an earlier run" in error(arguments("ck"))
    fewer = error(arguments("ck", "--resume", "--epochs", "5"))
    assert "had epochs=4, this one has 5" in fewer and "finish the 4 epochs first" in fewer
    assert "did you mean 'noise'" in error(arguments("other", noize=0.1))
    argv = arguments("other")
    assert "no data" in error([a for a in argv if not a.startswith("--tmpdir") and a not in (argv[3], argv[5])])
    config = tmp_path / "wide.json"
    config.write_text(json.dumps({**json.loads((tmp_path / "draft.json").read_text()), "hidden_size": 32}))
    assert "hidden states of size 16, the draft config has 32" in error([*arguments("other"), "--config", str(config)])


def test_resume_without_a_checkpoint_starts_anew_and_init_takes_a_draft(arguments, run, tmp_path, capsys):
    assert run(arguments("first", "--tracker", "none", "--resume", "--epochs", "1")) == 0
    assert "starting a new run" in capsys.readouterr().out
    draft = str(tmp_path / "first" / "final")
    assert run(arguments("second", "--tracker", "none", "--init", draft, "--epochs", "1", "--learning-rate", "0")) == 0
    assert torch.equal(load_draft(tmp_path / "second" / "final").fc.weight, load_draft(draft).fc.weight)


def test_a_run_is_resumed_with_its_own_init_only(arguments, run, tmp_path, capsys):
    """The weights of the checkpoint would replace those of another one in silence."""
    for name, seed in (("one", "1"), ("two", "2")):
        assert run(arguments(name, "--tracker", "none", "--epochs", "1", "--seed", seed)) == 0
    one, two = (("--init", str(tmp_path / name / "final")) for name in ("one", "two"))
    assert run(arguments("begun", "--tracker", "none", "--max-steps", "1", *one)) == 0
    capsys.readouterr()
    for other in ((), two):
        assert run(arguments("begun", "--tracker", "none", "--resume", *other)) == 2
        assert "the interrupted run had init=" in capsys.readouterr().err
    assert run(arguments("begun", "--tracker", "none", "--resume", *one)) == 0


def test_init_of_another_kind_is_refused(arguments, run, tmp_path, capsys):
    """What the config asks for is not silently that of the draft."""
    assert run(arguments("first", "--tracker", "none", "--epochs", "1")) == 0
    draft, config = str(tmp_path / "first" / "final"), tmp_path / "draft.json"
    content = json.loads(config.read_text())
    for change, told in (
        ({"msd": {"decoupled": False}}, "--init has msd.decoupled=True, --config False"),
        ({"msd": {"image_tokens": 3}}, "--init has msd.image_tokens=None, --config 3"),
        ({"intermediate_size": 48}, "--config 48"),
    ):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**content, **change}))
        assert run([*arguments("second", "--tracker", "none", "--init", draft), "--config", str(other)]) == 2
        assert told in capsys.readouterr().err


def test_a_kill_between_the_two_renames_of_a_replacement_is_put_right(tmp_path):
    store = CheckpointStore(tmp_path, 1, {})
    for name, text in (("best", "old"), (".tmp-best", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(text)
    (tmp_path / "best").rename(tmp_path / ".old-best")
    store.recover()
    assert [p.name for p in tmp_path.iterdir()] == ["best"] and (tmp_path / "best" / "f").read_text() == "old"
    (tmp_path / ".tmp-best").mkdir()
    replace_folder(tmp_path / ".tmp-best", tmp_path / "best")
    assert [p.name for p in tmp_path.iterdir()] == ["best"] and not list((tmp_path / "best").iterdir())


def test_pointer_to_a_removed_folder_falls_back_to_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, 1, {})
    assert store.latest() is None
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "latest").write_text("step-00000009\n")
    assert store.latest() == tmp_path / "step-00000002"
    with pytest.raises(UserError, match="earlier run"):
        store.refuse_to_overwrite()
    assert Progress().history == {"steps": [], "validations": []}

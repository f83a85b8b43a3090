"""What is recorded of a run: the rate, TensorBoard's values, and what Weights & Biases is told."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from train_support import logged

from eagle.train.tracking import Meter, Tracker, plot, stage_boundary
from eagle.train.trainer import Trainer


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still unless it is moved: ``clock.now += seconds``."""
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr("eagle.train.tracking.perf_counter", lambda: fake.now)
    return fake


def test_clock_leaves_out_pauses_and_what_lies_before_it_goes(clock):
    meter = Meter()
    clock.now += 50  # the start of the program
    meter.start()
    clock.now += 3
    with meter.paused():
        clock.now += 1000
        assert meter.seconds == 3
    clock.now += 2
    assert meter.seconds == 5
    meter.clear()
    clock.now += 4
    assert meter.seconds == 4


def test_state_carries_sums_and_seconds_over(clock):
    meter = Meter()
    meter.start()
    meter.add(torch.arange(6.0))
    clock.now += 3
    with meter.paused():
        clock.now += 70
        state = meter.state()
    other = Meter()
    other.restore(state)
    clock.now += 1000  # until it is resumed
    other.start()
    other.add(torch.ones(6))
    clock.now += 2
    assert (other.steps, other.seconds) == (2, 5)
    assert torch.equal(other.sums, torch.arange(6.0) + 1)
    empty = Meter()
    empty.restore(Meter().state())
    assert (empty.sums, empty.steps) == (None, 0)


@pytest.mark.parametrize("state", [
    {"sums": None, "steps": 3, "seconds": 1.0},
    {"sums": [1.0], "steps": 1, "seconds": 1.0},
    {"sums": torch.ones(6), "steps": 0, "seconds": 1.0},
    {"steps": 1, "seconds": 1.0},
])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(state):
    with pytest.raises((ValueError, LookupError)):
        Meter().restore(state)


def test_rate_is_that_of_the_steps(arguments, run, tmp_path, monkeypatch, clock):
    """A step of four samples takes a second, each validation and each checkpoint an hour. Stopped and resumed."""
    from eagle.train.checkpoint import CheckpointStore
    from eagle.train.engine import PlainEngine

    def slow(owner, name, seconds):
        true = getattr(owner, name)

        def call(*args, **named):
            clock.now += seconds
            return true(*args, **named)

        monkeypatch.setattr(owner, name, call)

    slow(PlainEngine, "step", 1)
    slow(Trainer, "_validate", 3600)
    slow(CheckpointStore, "save", 3600)
    settings = {"log_every": 2, "save_every": 3, "validate_every": 3}
    assert run(arguments("ck", "--tracker", "none", "--max-steps", "5", **settings)) == 0
    assert run(arguments("ck", "--tracker", "none", "--resume", **settings)) == 0
    assert [row["samples_per_second"] for row in logged(tmp_path / "ck")] == [4, 4, 4, 4]


def test_time_is_estimated_after_the_first_steps(tmp_path, clock, capsys):
    """The first step is slow, the others take two seconds each."""
    tracker = Tracker(tmp_path, "none", total=100, done=40, settings={})
    for seconds in (60, *[2] * 11):
        clock.now += seconds
        tracker.advance()
    tracker.bar.close()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line]
    assert line == "2 s a step: about 01:40 for the other 50 steps, without validation"


def colours(panel):
    return {line.get_label(): line.get_color() for line in panel.get_lines()}


def test_plot_has_one_meaning_a_colour(tmp_path, monkeypatch):
    from matplotlib import pyplot

    shares = [0, 0, 0.5, 1]
    steps = [
        {"step": 10 * at, "loss": 3 - at, "learning_rate": 1e-3 / at, "image_probability": share}
        for at, share in enumerate(shares, start=1)
    ]
    sets = {name: {"loss": 1.0, "tau": 2.0} for name in ("text", "image")}
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    served = [{"step": 20, "tau": 1.5}, {"step": 40, "tau": 2.5}]
    plot({"steps": steps, "validations": [{"step": 40, "results": sets}], "served": served}, tmp_path / "training.png")
    monkeypatch.undo()
    (figure,) = figures
    losses, taus, images, rates = figure.axes
    text, image = "validation, text set", "validation, image set"
    assert colours(losses)[text] == colours(taus)[text] != colours(losses)[image] == colours(taus)[image]
    (decoding,) = [line for line in taus.get_lines() if line.get_label() == "decoding"]
    assert (list(decoding.get_xdata()), list(decoding.get_ydata())) == ([20, 40], [1.5, 2.5])
    assert decoding.get_color() not in colours(losses).values()
    used = {*colours(losses).values(), *colours(taus).values()}
    assert used.isdisjoint(line.get_color() for panel in (images, rates) for line in panel.get_lines()[:1])
    for panel in figure.axes:
        assert list(panel.get_lines()[-1].get_xdata()) == [20, 20], "where image samples come in"
    assert list(images.get_lines()[0].get_ydata()) == shares
    assert list(rates.get_lines()[0].get_ydata()) == [row["learning_rate"] for row in steps]
    pyplot.close(figure)


def test_plot_of_one_stage_and_of_nothing(tmp_path):
    """Runs on one set, and one that was stopped before its first log."""
    row = {"step": 1, "loss": 1.0, "learning_rate": 1e-3, "image_probability": 1.0}
    for steps in ([], [row]):
        assert stage_boundary(steps) is None
        plot({"steps": steps, "validations": []}, tmp_path / "training.png")
        assert (tmp_path / "training.png").stat().st_size > 1000


def test_tensorboard_has_the_logged_values(arguments, run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(arguments("ck", "--max-steps", "3", validation_share=0.2)) == 0
    assert run(arguments("ck", "--resume", validation_share=0.2)) == 0
    board = EventAccumulator(str(tmp_path / "ck" / "tensorboard"))
    board.Reload()
    history = json.loads((tmp_path / "ck" / "training.json").read_text())
    for tag, rows in {
        "train/loss": [(row["step"], row["loss"]) for row in history["steps"]],
        "train/image_probability": [(row["step"], row["image_probability"]) for row in history["steps"]],
        "validation/image/tau": [(row["step"], row["results"]["image"]["tau"]) for row in history["validations"]],
        "validation/text/expected_tau": [
            (row["step"], row["results"]["text"]["expected_tau"]) for row in history["validations"]
        ],
    }.items():
        found = [(event.step, event.value) for event in board.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in rows] and len(rows) > 3
        assert [value for _, value in found] == pytest.approx([value for _, value in rows], rel=1e-5)


class FakeWandb:
    """Records what it is told."""

    def __init__(self):
        self.inits, self.logs, self.finished = [], [], 0

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def log(self, values, step):
        self.logs.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_is_told_settings_values_and_the_end(arguments, run, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert run(arguments("ck", "--tracker", "wandb", validation_share=0.2)) == 0
    (settings,) = fake.inits
    assert (settings["project"], settings["name"], settings["dir"]) == ("msd", "ck", str(tmp_path / "ck"))
    assert settings["config"]["epochs"] == 4 and settings["config"]["validation_share"] == 0.2
    told = {name: [] for name in ("train/loss", "validation/image/tau")}
    for step, values in fake.logs:
        for name in told.keys() & values.keys():
            told[name].append((step, values[name]))
    history = json.loads((tmp_path / "ck" / "training.json").read_text())
    assert told["train/loss"] == [(row["step"], row["loss"]) for row in history["steps"]]
    assert told["validation/image/tau"] == [
        (row["step"], row["results"]["image"]["tau"]) for row in history["validations"]
    ]
    assert [step for step, _ in fake.logs] == sorted(step for step, _ in fake.logs), "wandb drops steps that go back"
    assert fake.finished == 1 and not (tmp_path / "ck" / "tensorboard").exists()


def test_missing_wandb_is_one_line(arguments, run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    assert run(arguments("ck", "--tracker", "wandb")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "wandb is not installed" in line and "pip install wandb" in line

"""What a run measures and where it goes: progress bar, TensorBoard or Weights & Biases, ``training.json``, a plot and a
page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor
from tqdm import tqdm

from eagle.train.page import write_page
from llava.errors import UserError
from llava.files import atomic_write, write_json

FIRST_STEPS = 10
"""After so many steps the time that is left is estimated."""


class Meter:
    """``steps`` optimizer steps since the last log, and their ``sums`` [6] of `METRICS`, None if there are none. Its
    clock does not run until `start`."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.steps = 0
        self._seconds = 0.0
        self._started: float | None = None

    def add(self, metrics: Tensor) -> None:
        """Adds ``metrics`` [6] of one step."""
        self.sums = metrics if self.sums is None else self.sums.to(metrics.device) + metrics
        self.steps += 1

    def finite(self) -> bool:
        """Whether all values since the last log are numbers."""
        return self.sums is None or bool(self.sums.isfinite().all())

    @property
    def seconds(self) -> float:
        """Measured time since the last log."""
        return self._seconds + (0.0 if self._started is None else perf_counter() - self._started)

    def start(self) -> None:
        """Starts the clock."""
        self._started = perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock, during validations and checkpoints."""
        self.finite()  # waits for steps that a GPU has not finished
        self._seconds, self._started = self.seconds, None
        yield
        self.start()

    def clear(self) -> None:
        """Resets everything after a log."""
        self.sums, self.steps, self._seconds = None, 0, 0.0
        self.start()

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        sums = None if self.sums is None else self.sums.cpu()
        return {"sums": sums, "steps": self.steps, "seconds": self.seconds}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the values of ``state``; the clock does not run.

        Raises:
            ValueError, TypeError, LookupError: it was not made by `state`.
        """
        sums, steps, seconds = state["sums"], int(state["steps"]), float(state["seconds"])
        if (sums is None) != (steps == 0) or not (sums is None or isinstance(sums, Tensor)):
            raise ValueError("sums and steps do not fit")
        self.sums, self.steps, self._seconds, self._started = sums, steps, seconds, None


class Tracker:
    """Records a run in ``folder``. On other processes than the main one (``main`` false) it does nothing.

    Args:
        kind: one of `eagle.train.settings.TRACKERS`; TensorBoard is left out if it is not installed.
        total, done: optimizer steps in all, and those of the interrupted run.
        settings: recorded in ``training.json`` and with a Weights & Biases run.
    """

    def __init__(
        self, folder: Path, kind: str, total: int, done: int, settings: Mapping[str, Any], main: bool = True
    ) -> None:
        self.folder, self.main, self.settings = folder, main, dict(settings)
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not main, dynamic_ncols=True, mininterval=1.0)
        self._steps, self._first_step = 0, 0.0
        self._tensorboard: Any = None
        self._wandb: Any = None
        if main and kind == "tensorboard":
            self._tensorboard = _open_tensorboard(folder / "tensorboard", done)
        elif main and kind == "wandb":
            self._wandb = _open_wandb(folder, settings)

    def advance(self) -> None:
        """Counts a step. After the first ones it prints how long the others take."""
        self.bar.update()
        self._steps += 1
        if self._steps == 1:
            self._first_step = perf_counter()
        elif self._steps == FIRST_STEPS and self.main and (left := self.bar.total - self.bar.n):
            seconds = (perf_counter() - self._first_step) / (FIRST_STEPS - 1)
            time = tqdm.format_interval(left * seconds)
            self.bar.write(f"{seconds:.2g} s a step: about {time} for the other {left} steps, without validation")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a training step, numbers only."""
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", acc=f"{values['top1']:.3f}")
        self._record("train", step, values)

    def log_validation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Results of a validation, by data set."""
        for name, values in results.items():
            if self.main:
                at = " ".join(f"{share:.2f}" for share in values["accept_at"])
                self.bar.write(
                    f"step {step}: validation on {name}: loss {values['loss']:.4f}, top-1 {values['top1']:.3f}, "
                    f"top-3 {values['top3']:.3f}, simulated tau {values['tau']:.2f} (acceptance by step {at})"
                )
            numbers = {key: value for key, value in values.items() if key not in ("accept_at", "rows")}
            self._record(f"validation/{name}", step, numbers)

    def log_served(self, step: int, result: Mapping[str, Any], history: Mapping[str, Any]) -> None:
        """An evaluation by decoding, of the main process; the page shows it at once."""
        newest = history["validations"][-1:]
        simulated = [f"{values['tau']:.2f} on {name}" for row in newest for name, values in row["results"].items()]
        beside = f" (simulated: {', '.join(simulated)})" if simulated else ""
        self.bar.write(
            f"step {step}: decoding {len(result['answers'])} questions: tau {result['tau']:.2f}{beside}, "
            f"{result['new_tokens']} new tokens, {result['seconds']:.1f} s"
        )
        self._record("decoding", step, {name: result[name] for name in ("tau", "accepted_per_cycle")})
        write_page(history, self.folder / "training.html")

    def finish(self, history: Mapping[str, Any]) -> None:
        """Writes ``training.json``, ``training.png`` and ``training.html`` and closes everything."""
        self.bar.close()
        if self.main:
            write_json(self.folder / "training.json", {"settings": self.settings, **history})
            plot(history, self.folder / "training.png")
            write_page(history, self.folder / "training.html")
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _record(self, group: str, step: int, values: Mapping[str, float]) -> None:
        named = {f"{group}/{name}": value for name, value in values.items()}
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(named, step=step)


def _open_tensorboard(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)  # the first step that is logged again


def _open_wandb(folder: Path, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--tracker wandb: wandb is not installed", fix="pip install wandb") from None
    return wandb.init(project="msd", dir=str(folder), name=folder.name, config=dict(settings), resume="allow")


COLOURS = {"training": "0.45", "text": "tab:blue", "image": "tab:orange", "decoding": "tab:red"}
"""Of the plot: training on both sets, each set, and decoding."""
AXES_COLOURS = {"image_probability": "tab:purple", "learning_rate": "tab:green"}


def plot(history: Mapping[str, Any], path: Path) -> None:
    """Loss, simulated acceptance, share of image samples and learning rate over the steps; a dashed line where image
    samples come in. A colour means the same in all of them. ``history`` as in ``training.json``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained")
    (losses, taus), (shares, rates) = axes
    steps, validations = history["steps"], history["validations"]
    at = [row["step"] for row in steps]
    losses.plot(at, [row["loss"] for row in steps], lw=0.8, color=COLOURS["training"], label="training")
    for name in sorted({name for row in validations for name in row["results"]}):
        rows = [row for row in validations if name in row["results"]]
        for panel, key in ((losses, "loss"), (taus, "tau")):
            values = [row["results"][name][key] for row in rows]
            label = f"validation, {name} set"
            panel.plot([row["step"] for row in rows], values, marker=".", color=COLOURS[name], label=label)
    for panel, key, style in ((shares, "image_probability", "steps-pre"), (rates, "learning_rate", "default")):
        panel.plot(at, [row[key] for row in steps], color=AXES_COLOURS[key], drawstyle=style)
        panel.set_xlabel("step")
    if served := history.get("served"):
        at_served = [row["step"] for row in served]
        taus.plot(at_served, [row["tau"] for row in served], marker="o", color=COLOURS["decoding"], label="decoding")
    boundary = stage_boundary(steps)
    losses.set(ylabel="loss", title="Loss")
    taus.set(ylabel="tokens per verification", title="Acceptance: simulated (chain), and in decoding")
    shares.set(ylabel="share", ylim=(-0.05, 1.05), title="Share of image samples")
    rates.set(ylabel="rate", ylim=(0, None), title="Learning rate")
    for panel in axes.flat:
        if boundary is not None:
            panel.axvline(boundary, color="black", ls="--", lw=0.8, label="image samples come in")
        panel.grid(alpha=0.3)
        if panel in (losses, taus) and panel.get_legend_handles_labels()[0]:
            panel.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def stage_boundary(steps: Sequence[Mapping[str, float]]) -> float | None:
    """The last logged step before image samples come in; None if the run has one stage.

    >>> stage_boundary([{"step": at, "image_probability": share} for at, share in ((5, 0), (10, 0), (15, 0.5))])
    10
    """
    return next((a["step"] for a, b in pairwise(steps) if a["image_probability"] == 0 < b["image_probability"]), None)

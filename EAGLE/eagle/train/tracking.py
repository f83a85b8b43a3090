"""What a run measures and where it goes: progress bar, TensorBoard or Weights & Biases, ``training.json``, a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llava.errors import UserError
from llava.files import atomic_write, write_json


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
        settings: recorded with a Weights & Biases run.
    """

    def __init__(
        self, folder: Path, kind: str, total: int, done: int, settings: Mapping[str, Any], main: bool = True
    ) -> None:
        self.folder, self.main = folder, main
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not main, dynamic_ncols=True, mininterval=1.0)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if main and kind == "tensorboard":
            self._tensorboard = _open_tensorboard(folder / "tensorboard", done)
        elif main and kind == "wandb":
            self._wandb = _open_wandb(folder, settings)

    def advance(self) -> None:
        self.bar.update()

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

    def finish(self, history: Mapping[str, Any]) -> None:
        """Writes ``training.json`` and ``training.png`` and closes everything."""
        self.bar.close()
        if self.main:
            write_json(self.folder / "training.json", history)
            plot(history, self.folder / "training.png")
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


def plot(history: Mapping[str, Any], path: Path) -> None:
    """Loss on the left, simulated acceptance on the right, over the steps. ``history`` as in ``training.json``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps, validations = history["steps"], history["validations"]
    left.plot([row["step"] for row in steps], [row["loss"] for row in steps], lw=0.8, label="training")
    for name in sorted({name for row in validations for name in row["results"]}):
        rows = [row for row in validations if name in row["results"]]
        at = [row["step"] for row in rows]
        left.plot(at, [row["results"][name]["loss"] for row in rows], marker=".", label=f"validation, {name}")
        right.plot(at, [row["results"][name]["tau"] for row in rows], marker=".", label=name)
    left.set(xlabel="step", ylabel="loss", title="Loss")
    right.set(xlabel="step", ylabel="tokens per verification", title="Simulated acceptance (chain)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)

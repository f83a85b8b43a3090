"""Checkpoints of a run. A folder is complete or absent.

::

    CKPT/
      step-00001200/   config.json, model.safetensors   the draft in the published layout
                       provenance.json                  commit, versions, command, data and settings
                       progress.json, state/            everything else that --resume needs; frozen parameters are
                                                        the base's
      best/            the draft with the best simulated acceptance in validation
      final/           the draft where the run ended or stopped
      latest           name of the newest step folder
      training.json, training.png, training.html, tensorboard/

A folder is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from eagle.drafts.checkpoint import save_draft
from eagle.locks import lock_folder
from eagle.provenance import now, record
from eagle.train.engine import Engine
from eagle.train.tracking import Meter
from llava.errors import UserError
from llava.files import atomic_write, read_json, write_json, write_text
from llava.memory import is_out_of_memory

TEMPORARY, REPLACED = ".tmp-", ".old-"
# what torch and DeepSpeed raise for a state that is truncated, altered, of another run, or incomplete
DAMAGE = (
    RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError, AssertionError,
    pickle.UnpicklingError,
)  # fmt: skip
ELSEWHERE = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM, errno.ETIMEDOUT)
MACHINE = (
    "CUDA error",
    "NCCL error",
    "CUDNN_STATUS",
    "CUBLAS_STATUS",
)  # in messages about the machine
SHARED = ("step", "best", "history", "run")  # parts of the progress that are the same in all processes
COMPARED = ("micro", "accumulation", "world", "epochs")
"""Settings of a run that `check_same_run` does not only compare for equality."""
KIND = "draft_kind"
NOT_IN_OLDER_RUNS = ("bf16", "fp16", "gradient_clipping", "init", KIND)
STATES = "states_"  # prefix of the names that describe a run's stored states

DEEPSPEED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""Plain classes that DeepSpeed's states may contain beside tensors."""


@dataclass
class Progress:
    """State of a run: ``step`` optimizer steps done; ``best`` the best validation score; ``history`` all logged values;
    ``run`` the settings that a resumed run must share; ``meter`` what this process measured since the last log."""

    step: int = 0
    best: float | None = None
    history: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"steps": [], "validations": []})
    run: dict[str, Any] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)


class CheckpointStore:
    """The checkpoint folder of a run. Methods that take an engine are called by all its processes."""

    def __init__(self, folder: str | Path, keep_last: int, provenance: Mapping[str, Any]) -> None:
        self.folder, self.keep_last, self.provenance = Path(folder), keep_last, provenance
        self._lock: ExitStack | None = None

    def lock(self) -> None:
        """Locks the folder until `close`, or the end of this process. The main process calls it before anything else.

        Raises:
            UserError: another run writes here.
        """
        if self._lock is None:
            stack = ExitStack()
            stack.enter_context(lock_folder(self.folder))
            self._lock = stack

    def check_shared(self, engine: Engine) -> None:
        """All processes write parts of a checkpoint into a folder that the main one makes.

        Raises:
            UserError: some process does not see what the main one writes here.
        """
        mark = self.folder / f"{TEMPORARY}shared"
        if engine.is_main:
            mark.mkdir(parents=True, exist_ok=True)
        engine.barrier()
        blind = int(engine.sum(torch.tensor(float(not mark.is_dir()))))
        if engine.is_main:
            mark.rmdir()
        if blind:
            what = f"{blind} of {engine.sizes.world} processes do not see the main one's folder of checkpoints"
            raise UserError(what, self.folder, "put --cpdir on a file system that all machines share")

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def step_folders(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def recover(self) -> None:
        """Removes unfinished folders of a killed run. The main process calls it after `lock`."""
        for path in self.folder.glob(f"{REPLACED}*"):
            name = self.folder / path.name.removeprefix(REPLACED)
            if name.exists():
                shutil.rmtree(path)
            else:
                path.rename(name)
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path)

    def refuse_to_overwrite(self) -> None:
        """Raises `UserError` if the folder has checkpoints of an earlier run."""
        if self.step_folders() or (self.folder / "final").exists():
            raise UserError(
                "has checkpoints of an earlier run", where=self.folder, fix="add --resume, or give another --cpdir"
            )

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        pointer = self.folder / "latest"
        if pointer.is_file():
            named = self.folder / pointer.read_text(encoding="utf-8").strip()
            if named.is_dir() and named.name.startswith("step-"):
                return named
        folders = self.step_folders()
        return folders[-1] if folders else None

    def save(self, engine: Engine, progress: Progress) -> None:
        """Writes ``step-N``, points ``latest`` at it and removes all but the last ``keep_last``."""
        name = f"step-{progress.step:08d}"
        temporary = self._begin(engine, name)
        engine.save(temporary / "state")
        with atomic_write(temporary / "state" / f"random-{engine.rank:03d}.pt") as file:
            torch.save({**_random_state(), "meter": progress.meter.state()}, file)
        engine.barrier()
        if engine.is_main:
            write_json(temporary / "progress.json", {name: getattr(progress, name) for name in SHARED})
            self._finish(engine, temporary, name, progress.step)
            write_text(self.folder / "latest", name + "\n")
            for old in self.step_folders()[: -self.keep_last]:
                shutil.rmtree(old)
        engine.barrier()

    def save_draft(self, engine: Engine, name: str, step: int) -> None:
        """Writes the draft alone, as ``best`` or ``final``."""
        temporary = self._begin(engine, name)
        if engine.is_main:
            self._finish(engine, temporary, name, step)
        engine.barrier()

    def load(self, engine: Engine, folder: Path, run: Mapping[str, Any], steps_per_epoch: int) -> Progress:
        """Restores ``engine`` from a step folder; ``run`` is compared with the interrupted run's.

        Raises:
            UserError: see `check_same_run`; or a file is damaged.
        """
        read = read_json(folder / "progress.json", "progress of the interrupted run")
        whole = isinstance(read, dict) and set(read) == set(SHARED) and isinstance(read["run"], dict)
        if not whole or not set(COMPARED) <= set(read["run"]):
            raise UserError(
                "checkpoint is damaged (progress.json)", where=folder, fix="remove it and resume from the one before"
            )
        progress = Progress(**read)
        given = json.loads(json.dumps(run))
        check_same_run(progress, given, steps_per_epoch, folder)
        world, progress.run = progress.run["world"], {**progress.run, **given}
        try:
            engine.load(folder / "state")
            states = [
                torch.load(folder / "state" / f"random-{rank:03d}.pt", weights_only=True) for rank in range(world)
            ]
            _set_random_state(states[engine.rank % world])
            if "meter" in states[0]:  # older runs do not have it
                meters = [state["meter"] for state in states]
                progress.meter.restore(meters[engine.rank] if world == engine.sizes.world else mean_state(meters))
        except DAMAGE as error:
            if not blames_file(error):
                raise
            raise UserError(
                f"checkpoint is damaged ({type(error).__name__})",
                where=folder,
                fix="remove this folder and resume from the one before",
            ) from error
        return progress

    def _begin(self, engine: Engine, name: str) -> Path:
        temporary = self.folder / f"{TEMPORARY}{name}"
        if engine.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "state").mkdir(parents=True) if name.startswith("step-") else temporary.mkdir(parents=True)
        engine.barrier()
        return temporary

    def _finish(self, engine: Engine, temporary: Path, name: str, step: int) -> None:
        save_draft(engine.objective.draft, temporary)
        write_json(temporary / "provenance.json", {**self.provenance, "step": step, "date": now()})
        replace_folder(temporary, self.folder / name)


def check_same_run(progress: Progress, run: Mapping[str, Any], steps_per_epoch: int, folder: Path) -> None:
    """Checks that a run with the settings and data ``run`` can continue an interrupted one.

    Another number of processes is accepted with the same micro-batch and total batch: each step has the same
    micro-batches then. More epochs are accepted after the end of all epochs.

    Raises:
        UserError: a value that decides the loss curve differs.
    """
    fix = "resume with the same settings and data, or start in another --cpdir"
    old, new = progress.run, run
    pieces, given = (one["accumulation"] * one["world"] for one in (old, new))  # micro-batches of a step
    if old["micro"] == new["micro"] and pieces != given:
        if new["world"] != old["world"] and pieces % new["world"] == 0:
            fix = f"with {new['world']} processes set gradient_accumulation_steps to {pieces // new['world']}"
        raise UserError(
            f"the interrupted run had {old['micro'] * pieces} samples a step ({old['micro']} x {old['accumulation']} "
            f"accumulated x {old['world']} processes), this one has {new['micro'] * given}",
            where=folder,
            fix=fix,
        )
    for key in {**new, **old}:
        before, current = old.get(key), new.get(key)
        unknown = (key.startswith(STATES) or key in NOT_IN_OLDER_RUNS) and None in (before, current)
        if before == current or unknown or key in ("accumulation", "world"):
            continue
        if key == "epochs" and new["epochs"] > old["epochs"]:
            if progress.step == steps_per_epoch * old["epochs"]:
                continue
            fix = f"finish the {before} epochs first, or start in another --cpdir"
        raise UserError(f"the interrupted run had {key}={before}, this one has {current}", where=folder, fix=fix)


def mean_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of the processes' `Meter.state`s, for another number of processes: their mean stays the same."""
    sums = None if states[0]["sums"] is None else torch.stack([state["sums"] for state in states]).mean(dim=0)
    return {**states[0], "sums": sums}


def check_pickles(folder: Path) -> None:
    """Checks that the ``*.pt`` files below ``folder`` contain only tensors, plain data and `DEEPSPEED_CLASSES`.

    DeepSpeed unpickles its own files without limits, so that a file could call any function. Reading the names in a
    file runs nothing.

    Raises:
        UnpicklingError: a file contains something else, or is not in torch's format.
    """
    for file in sorted(folder.rglob("*.pt")):
        try:
            foreign = set(get_unsafe_globals_in_checkpoint(file)) - DEEPSPEED_CLASSES
        except (RuntimeError, ValueError, EOFError) as error:
            raise pickle.UnpicklingError(f"{file.name} is not in torch's format") from error
        if foreign:
            raise pickle.UnpicklingError(f"{file.name} names {', '.join(sorted(foreign))}")


def blames_file(error: BaseException) -> bool:
    """Whether an error of `DAMAGE` means that a state is damaged, and not that a device is full or broken."""
    if isinstance(error, OSError):
        return error.errno not in ELSEWHERE
    others = isinstance(error, torch.distributed.DistError) or any(part in str(error) for part in MACHINE)
    return not (others or is_out_of_memory(error))


def replace_folder(temporary: Path, final: Path) -> None:
    """Gives ``temporary`` the name ``final``. `recover` finishes a replacement that was killed halfway."""
    old = final.with_name(REPLACED + final.name)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def describe_run(data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What made a checkpoint: `eagle.provenance.record`, data and settings."""
    return {**record(), "data": dict(data), "settings": dict(settings)}


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

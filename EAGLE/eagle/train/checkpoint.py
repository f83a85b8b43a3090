"""Checkpoints of a run, complete or absent, never half.

::

    CKPT/
      step-00001200/   config.json, model.safetensors   the draft in the published layout
                       provenance.json                  what made it
                       progress.json, state/            everything that --resume needs
      best/            the draft with the best simulated acceptance in validation
      final/           the draft at the end
      latest           name of the newest step folder
      training.json, training.png, tensorboard/

A folder is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eagle.drafts.checkpoint import save_draft
from eagle.locks import lock_folder
from eagle.provenance import now, record
from eagle.train.engine import Engine
from eagle.train.meter import Meter
from llava.errors import UserError
from llava.files import atomic_write, read_json, write_json
from llava.memory import is_out_of_memory

TEMPORARY, REPLACED = ".tmp-", ".old-"
# what torch and DeepSpeed raise for a state that is cut off, altered, not its own, or without one of its files
DAMAGE = (
    RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError, AssertionError,
    pickle.UnpicklingError,
)  # fmt: skip
ELSEWHERE = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM, errno.ETIMEDOUT)
MACHINE = ("CUDA error", "NCCL error", "CUDNN_STATUS", "CUBLAS_STATUS")  # parts of messages that blame no file
SHARED = ("step", "best", "history", "run")  # parts of the progress that are the same in all processes
STATES = "states_"  # begins the names of what a run knows of its stored states


@dataclass
class Progress:
    """Where a run is: ``step`` optimizer steps done; ``best`` the best validation score; ``history`` all logged values;
    ``run`` the settings that a resumed run must share; ``meter`` what this process has measured since the last log."""

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

    def hold(self) -> None:
        """Keeps other runs out of the folder until `close`, or the end of this process. For the main process, before
        anything else.

        Raises:
            UserError: another run writes here.
        """
        if self._lock is None:
            lock = ExitStack()
            lock.enter_context(lock_folder(self.folder))
            self._lock = lock

    def close(self) -> None:
        """Lets other runs in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def step_folders(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def recover(self) -> None:
        """Removes what a killed run left unfinished. For the main process, after `hold`."""
        for path in self.folder.glob(f"{REPLACED}*"):
            name = self.folder / path.name.removeprefix(REPLACED)
            if name.exists():
                shutil.rmtree(path)
            else:
                path.rename(name)
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path)

    def refuse_to_overwrite(self) -> None:
        """Raises `UserError` where a run has left checkpoints and ``--resume`` was not given."""
        if self.step_folders() or (self.folder / "final").exists():
            raise UserError(
                "has checkpoints of an earlier run", where=self.folder, fix="add --resume, or give another --cpdir"
            )

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None where there is none."""
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
            self._finish(engine, temporary, name)
            with atomic_write(self.folder / "latest") as pointer:
                pointer.write_text(name + "\n", encoding="utf-8")
            for old in self.step_folders()[: -self.keep_last]:
                shutil.rmtree(old)
        engine.barrier()

    def save_draft(self, engine: Engine, name: str) -> None:
        """Writes the draft alone, as ``best`` or ``final``."""
        temporary = self._begin(engine, name)
        if engine.is_main:
            self._finish(engine, temporary, name)
        engine.barrier()

    def load(self, engine: Engine, folder: Path, run: Mapping[str, Any]) -> Progress:
        """Restores ``engine`` from a step folder; ``run`` is compared with the interrupted run's.

        Raises:
            UserError: a setting that decides the loss curve differs; the message names it. Or a file is damaged.
        """
        read = read_json(folder / "progress.json", "progress of the interrupted run")
        if not isinstance(read, dict) or set(read) != set(SHARED):
            raise UserError(
                "checkpoint is damaged (progress.json)", where=folder, fix="remove it and resume from the one before"
            )
        progress = Progress(**read)
        given = json.loads(json.dumps(run))
        for key in {**given, **progress.run}:
            before, current = progress.run.get(key), given.get(key)
            unknown = key.startswith(STATES) and None in (before, current)  # as in runs from before
            if before != current and not unknown:
                raise UserError(
                    f"the interrupted run had {key}={before}, this one has {current}",
                    where=folder,
                    fix="resume with the same settings and data, or start in another --cpdir",
                )
        progress.run = {**progress.run, **given}
        random = folder / "state" / f"random-{engine.rank:03d}.pt"
        try:
            engine.load(folder / "state")
            own = torch.load(random, weights_only=True)
            _set_random_state(own)
            if "meter" in own:  # runs from before it was kept can go on
                progress.meter.restore(own["meter"])
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

    def _finish(self, engine: Engine, temporary: Path, name: str) -> None:
        save_draft(engine.objective.draft, temporary)
        write_json(temporary / "provenance.json", {**self.provenance, "date": now()})
        replace_folder(temporary, self.folder / name)


def blames_file(error: BaseException) -> bool:
    """Whether one of `DAMAGE` says that a state is damaged, and not that a device is full or broken."""
    if isinstance(error, OSError):
        return error.errno not in ELSEWHERE
    others = isinstance(error, torch.distributed.DistError) or any(told in str(error) for told in MACHINE)
    return not (others or is_out_of_memory(error))


def replace_folder(temporary: Path, final: Path) -> None:
    """Gives ``temporary`` the name ``final``. A kill in between leaves a state that `recover` puts right."""
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

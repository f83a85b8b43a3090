"""The engine for runs that DeepSpeed's launcher started. The only module that imports DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor

from eagle.train.checkpoint import check_pickles
from eagle.train.collate import Batch
from eagle.train.engine import METRICS, Engine, adamw, metrics_of
from eagle.train.loss import DraftObjective, trained_parameters
from eagle.train.schedule import BatchSizes
from eagle.train.settings import TrainConfig
from llava.errors import UserError, reason_of

TAG = "state"


def join_processes() -> tuple[int, int]:
    """Connects the launched processes; returns (rank, number of processes)."""
    deepspeed.init_distributed()
    return comm.get_rank(), comm.get_world_size()


def own_device() -> torch.device:
    """The device that the launcher assigned to this process."""
    accelerator = get_accelerator()
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(accelerator.current_device_name())


def check_accepted(settings: dict[str, Any]) -> None:
    """Raises `UserError` for a config that DeepSpeed itself refuses, such as one with an unknown key in a section."""
    try:
        DeepSpeedConfig(deepcopy(settings))
    except Exception as error:  # each section raises its own
        raise UserError("DeepSpeed does not accept its config", "--deepspeed_config", reason_of(error)) from error


class DeepSpeedEngine(Engine):
    """ZeRO, precision, clipping and accumulation as DeepSpeed's config says."""

    def __init__(
        self, objective: DraftObjective, config: TrainConfig, settings: dict[str, Any], sizes: BatchSizes
    ) -> None:
        self.rank, self.sizes = comm.get_rank(), sizes
        check_accepted(settings)
        self.engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=adamw(objective, config),
            model_parameters=trained_parameters(objective),
            config={"steps_per_print": 10**9, **settings},
        )
        self.objective = self.engine.module
        self.device = torch.device(get_accelerator().current_device_name())

    def step(self, batches: Sequence[Batch], learning_rate: float) -> Tensor:
        total = torch.zeros(len(METRICS), device=self.device)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        for batch in batches:
            losses = self.engine(batch.to(self.device))
            self.engine.backward(losses.total)
            self.engine.step()
            total += metrics_of(losses)
        return total / len(batches)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        if not (folder / TAG).is_dir():
            raise UserError("was not written by a DeepSpeed run", where=folder, fix="resume with the same launcher")
        check_pickles(folder / TAG)
        self.engine.load_checkpoint(str(folder), tag=TAG)

    def sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        comm.all_reduce(values)
        return values

    def barrier(self) -> None:
        comm.barrier()

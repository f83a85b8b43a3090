"""Optimizer steps: the interface of engines, and the plain engine for one process without DeepSpeed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle.train.collate import Batch
from eagle.train.loss import TOP, DraftObjective, Losses, trained_parameters
from eagle.train.schedule import BatchSizes
from eagle.train.settings import TrainConfig, find_config
from llava.device import cpu_has_bfloat16
from llava.errors import UserError
from llava.files import atomic_write, read_json

METRICS = ("loss", "hidden_loss", "token_loss", *(f"top{k}" for k in range(1, TOP + 1)))


class Engine(ABC):
    """One process of a training run. ``sizes`` are those of all processes together."""

    rank: int = 0
    objective: DraftObjective
    sizes: BatchSizes
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @abstractmethod
    def step(self, batches: Sequence[Batch], learning_rate: float) -> Tensor:
        """One optimizer step over ``sizes.accumulation`` micro-batches; returns this process's `METRICS` [6]."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes everything that `load` needs. Called by all processes, with the same folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""

    @abstractmethod
    def barrier(self) -> None:
        """Waits for all processes."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.sum(values) / self.sizes.world


def metrics_of(losses: Losses) -> Tensor:
    """`METRICS` of one micro-batch, [6] float32 without gradient."""
    values = torch.stack([losses.total.detach().float(), losses.hidden, losses.token])
    return torch.cat([values, losses.hits / losses.rows.clamp(min=1)])


def adamw(objective: DraftObjective, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trained_parameters(objective),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def read_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Reads DeepSpeed's config. It must not have an optimizer or a schedule: these are settings of the run."""
    path = find_config(path)
    config = read_json(path, "DeepSpeed config")
    if not isinstance(config, dict):
        raise UserError("DeepSpeed config is not a JSON object", where=path)
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(
                f"DeepSpeed config has '{key}'", where=path, fix="set it in the 'train' section of --config instead"
            )
    return config


def suit_device(config: dict[str, Any], main: bool) -> dict[str, Any]:
    """The config with bf16 switched off on a CPU without bf16 arithmetic; the main process prints a line."""
    if not config.get("bf16", {}).get("enabled") or torch.accelerator.is_available() or cpu_has_bfloat16():
        return config
    if main:
        print("this CPU has no bf16 arithmetic: training in float32", flush=True)
    return {**config, "bf16": {**config["bf16"], "enabled": False}}


class PlainEngine(Engine):
    """One process, no launcher, no DeepSpeed: float32 weights, bf16 autocast where DeepSpeed's config says bf16."""

    def __init__(
        self, objective: DraftObjective, config: TrainConfig, deepspeed: Mapping[str, Any], sizes: BatchSizes
    ) -> None:
        self.device = self.choose_device()
        self.objective = objective.to(self.device)
        self.sizes = sizes
        self.optimizer = adamw(objective, config)
        self.clip = float(deepspeed.get("gradient_clipping", 0.0))
        self.bf16 = bool(deepspeed.get("bf16", {}).get("enabled", False))

    @staticmethod
    def choose_device() -> torch.device:
        """A GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def step(self, batches: Sequence[Batch], learning_rate: float) -> Tensor:
        total = torch.zeros(len(METRICS), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                losses = self.objective(batch.to(self.device))
            (losses.total / len(batches)).backward()
            total += metrics_of(losses)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(trained_parameters(self.objective), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / len(batches)

    def save(self, folder: Path) -> None:
        state = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        with atomic_write(folder / "engine.pt") as temporary:
            torch.save(state, temporary)

    def load(self, folder: Path) -> None:
        file = folder / "engine.pt"
        if not file.is_file():
            raise UserError("was not written by a run without launcher", where=folder, fix="use the same launcher")
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])

    def sum(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        """One process does not wait."""

"""Optimizer steps: the interface of engines, and the plain engine for one process without DeepSpeed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle.drafts.head import TrainedHead
from eagle.train.collate import Batch
from eagle.train.objective import TOP, Losses, Objective, load_trained, trained_parameters, trained_state
from eagle.train.schedule import BatchSizes
from eagle.train.settings import TrainConfig, find_config
from llava.device import cpu_has_bfloat16
from llava.errors import UserError
from llava.files import atomic_write, read_json
from llava.strict import reject_unknown

METRICS = ("loss", "hidden_loss", "token_loss", *(f"top{k}" for k in range(1, TOP + 1)))


class Engine(ABC):
    """One process of a training run. ``sizes`` are those of all processes together."""

    rank: int = 0
    objective: Objective[TrainedHead]
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


def adamw(objective: Objective[TrainedHead], config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trained_parameters(objective),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


DEEPSPEED_KEYS = [
    "activation_checkpointing",
    "aio",
    "amp",
    "autotuning",
    "bf16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "compression_training",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "disable_allgather",
    "dump_state",
    "eigenvalue",
    "elasticity",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "graph_harvesting",
    "hybrid_engine",
    "logging",
    "memory_breakdown",
    "nebula",
    "optimizer",
    "pipeline",
    "prescale_gradients",
    "progressive_layer_drop",
    "scheduler",
    "seq_parallel_communication_data_type",
    "sparse_attention",
    "sparse_gradients",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
]
"""Keys of DeepSpeed's config."""
SECTIONS = {
    "bf16": '{"enabled": true}',
    "fp16": '{"enabled": true}',
    "zero_optimization": '{"stage": 2}',
    "activation_checkpointing": "{...}",
    "data_types": "{...}",
    "flops_profiler": "{...}",
    "tensorboard": "{...}",
    "wandb": "{...}",
    "comms_logger": "{...}",
}
"""Keys whose value is an object, and its form."""
PRECISION_KEYS = {
    "bf16": (
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ),
    "fp16": (
        "enabled",
        "auto_cast",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
        "fp16_master_weights_and_grads",
    ),
}
"""Keys of the sections that a run without DeepSpeed reads too."""


PLAIN_KEYS = (
    "bf16",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "zero_optimization",
)
"""Keys that a run without DeepSpeed serves, or that change nothing in one process."""


def read_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Reads DeepSpeed's config. Values "auto", which only Hugging Face's trainers fill in, count as not set.

    Raises:
        UserError: it has an unknown key, a value of a wrong form, an optimizer or a schedule (these are settings of the
            run), or a setting that a draft cannot be trained with.
    """
    path = find_config(path)
    config = read_json(path, "DeepSpeed config")
    if not isinstance(config, dict):
        raise UserError("DeepSpeed config is not a JSON object", where=path)
    if "bfloat16" in config:
        raise UserError("'bfloat16' is an old name", where=path, fix='write "bf16": {"enabled": true}')
    reject_unknown(config, DEEPSPEED_KEYS, path)
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(
                f"DeepSpeed config has '{key}'", where=path, fix="set it in the 'train' section of --config instead"
            )
    config = without_auto(config)
    check_deepspeed_config(config, path)
    return config


def without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """The section, at all depths, without values "auto".

    >>> without_auto({"a": "auto", "b": {"c": "auto", "d": 1}})
    {'b': {'d': 1}}
    """
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def check_deepspeed_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Raises `UserError` for a value that would end in a traceback of DeepSpeed, or in a broken draft."""
    for key, form in SECTIONS.items():
        if key in config and not isinstance(config[key], dict):
            raise UserError(f"'{key}' is {config[key]!r}", where=where, fix=f'write "{key}": {form}')
    for key, known in PRECISION_KEYS.items():
        reject_unknown(config.get(key, {}), known, f"{where}, section '{key}'")
        enabled = config.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise UserError(f"'{key}.enabled' is {enabled!r}", where=where, fix="give true or false")
    if config.get("fp16", {}).get("enabled") and not torch.accelerator.is_available():
        raise UserError("fp16 cannot be trained on a CPU", where=where, fix="use bf16, or neither")
    clip = config.get("gradient_clipping", 0.0)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 <= clip < math.inf:
        raise UserError(f"'gradient_clipping' is {clip!r}", where=where, fix="give a number; 0 does not clip")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2):
        reason = ": its weights are in pieces that a draft cannot be saved from" if stage == 3 else ""
        raise UserError(f"zero_optimization.stage {stage!r}{reason}", where=where, fix="use stage 0, 1 or 2")
    for key in ("offload_optimizer", "offload_param", "cpu_offload"):
        offload = zero.get(key)
        if offload not in (None, False) and not (isinstance(offload, dict) and offload.get("device") == "none"):
            raise UserError(
                f"zero_optimization.{key}: offloading is not supported",
                where=where,
                fix="leave it out",
            )


def without_effect(config: Mapping[str, Any]) -> str | None:
    """A line that names the settings which a run without DeepSpeed does not serve; None if there are none."""
    names = [key for key in config if key not in PLAIN_KEYS]
    return f"without DeepSpeed's launcher these settings have no effect: {', '.join(names)}" if names else None


def precision(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of DeepSpeed's config, beside the batch sizes, that decide the losses."""
    parts = {key: bool(config.get(key, {}).get("enabled")) for key in PRECISION_KEYS}
    return {**parts, "gradient_clipping": float(config.get("gradient_clipping", 0.0))}


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
        self, objective: Objective[TrainedHead], config: TrainConfig, deepspeed: Mapping[str, Any], sizes: BatchSizes
    ) -> None:
        if deepspeed.get("fp16", {}).get("enabled"):
            raise UserError("fp16 needs DeepSpeed", fix="start the run with DeepSpeed's launcher, or use bf16")
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
        state = {"objective": trained_state(self.objective), "optimizer": self.optimizer.state_dict()}
        with atomic_write(folder / "engine.pt") as temporary:
            torch.save(state, temporary)

    def load(self, folder: Path) -> None:
        file = folder / "engine.pt"
        if not file.is_file():
            raise UserError("was not written by a run without launcher", where=folder, fix="use the same launcher")
        state = torch.load(file, map_location="cpu", weights_only=True)
        load_trained(state["objective"], self.objective)
        self.optimizer.load_state_dict(state["optimizer"])

    def sum(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        """One process does not wait."""

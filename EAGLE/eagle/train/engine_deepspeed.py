"""The engine for runs that DeepSpeed's launcher started. The only module that imports DeepSpeed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root, is_ninja_available

from eagle.drafts.head import TrainedHead
from eagle.train.checkpoint import check_pickles
from eagle.train.collate import Batch
from eagle.train.engine import METRICS, Engine, adamw, metrics_of
from eagle.train.objective import Objective, load_trained, trained_parameters
from eagle.train.schedule import BatchSizes
from eagle.train.settings import TrainConfig
from llava.errors import UserError, reason_of

TAG = "state"


def join_processes() -> tuple[int, int]:
    """Connects the launched processes; returns (rank, number of processes)."""
    check_compiler(main=os.environ["RANK"] == "0")
    deepspeed.init_distributed()
    return comm.get_rank(), comm.get_world_size()


def check_compiler(main: bool) -> None:
    """Checks that DeepSpeed can compile its operation for processes without a GPU, and says if it is about to.

    Raises:
        UserError: there is no C++ compiler, or no ninja. torch needs both even if the operation is compiled already.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME) or installed_ops.get(builder.NAME):
        return
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        fix = "install g++, set CXX to another compiler, or train in one process with `python main_deepspeed.py ...`"
        raise UserError("DeepSpeed compiles an operation and finds no C++ compiler", compiler, fix)
    if not is_ninja_available():
        raise UserError("DeepSpeed compiles an operation and finds no ninja", fix="pip install ninja")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if main and not any(folder.rglob(f"{builder.NAME}.so")):
        print(
            f"DeepSpeed compiles {builder.NAME} with {compiler}, once on a machine, into {folder}: "
            "this takes one to three minutes without further output",
            flush=True,
        )


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
        self, objective: Objective[TrainedHead], config: TrainConfig, settings: dict[str, Any], sizes: BatchSizes
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
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        if not (folder / TAG).is_dir():
            raise UserError("was not written by a DeepSpeed run", where=folder, fix="resume with the same launcher")
        check_pickles(folder / TAG)
        shards = sorted((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
        if len(shards) in (0, self.sizes.world):
            self.engine.load_checkpoint(str(folder), tag=TAG, custom_load_fn=load_module)
            return
        if not isinstance(self.engine.optimizer, DeepSpeedZeroOptimizer) or self.engine.zero_round_robin_gradients():
            fix = "resume with as many, or use ZeRO stage 1 or 2 without round_robin_gradients in the whole run"
            raise UserError(f"was written by {len(shards)} processes, these are {self.sizes.world}", folder, fix)
        self.engine.load_checkpoint(str(folder), tag=TAG, load_module_only=True, custom_load_fn=load_module)
        states = [torch.load(file, weights_only=False, map_location="cpu")["optimizer_state_dict"] for file in shards]
        partition = self.engine.optimizer.single_partition_of_fp32_groups[0].numel()
        own = repartition(states, partition, self.rank)
        self.engine.optimizer.load_state_dict([own] * self.sizes.world, load_from_fp32_weights=True)

    def sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        comm.all_reduce(values)
        return values

    def barrier(self) -> None:
        comm.barrier()


def load_module(src: Mapping[str, Tensor], dst: Objective[TrainedHead]) -> None:
    """`load_trained` as DeepSpeed calls it."""
    load_trained(src, dst)


def repartition(states: Sequence[Mapping[str, Any]], size: int, rank: int) -> dict[str, Any]:
    """The state of ZeRO's optimizer for process ``rank`` of another number of processes.

    The trained weights are one group. Each process has an equal part of its flat tensors; the last parts are padded,
    the moments in the file too, the weights not.

    Args:
        states: of all old processes.
        size: of a new part.
    """

    def part(old: Sequence[Tensor]) -> Tensor:
        own = torch.cat(list(old))[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(own, (0, size - own.numel()))

    weights = [state["single_partition_of_fp32_groups"][0] for state in states]
    optimizers = [state["base_optimizer_state"] for state in states]
    moments: dict[str, Any] = {}
    for name, value in optimizers[0]["state"][0].items():
        parts = [optimizer["state"][0][name] for optimizer in optimizers]
        whole = torch.is_tensor(value) and value.dim() == 1
        moments[name] = part([old[: len(own)] for old, own in zip(parts, weights, strict=True)]) if whole else value
    return {
        **states[0],
        "single_partition_of_fp32_groups": [part(weights)],
        "base_optimizer_state": {**optimizers[0], "state": {0: moments}},
    }


def _rank_of(shard: Path) -> int:
    """The process that wrote a file of ZeRO's optimizer."""
    return int(shard.name.split("zero_pp_rank_")[1].split("_")[0])

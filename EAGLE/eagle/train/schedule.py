"""Batch sizes, numbers of steps and the learning rate, computed before training starts. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.train.settings import TrainConfig
from llava.errors import UserError


@dataclass(frozen=True)
class BatchSizes:
    """``micro``: samples of a forward on one process; ``accumulation``: forwards of a step; ``world``: processes."""

    micro: int
    accumulation: int
    world: int

    @property
    def total(self) -> int:
        """Samples of one optimizer step over all processes."""
        return self.micro * self.accumulation * self.world

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any], world: int, where: str | Path) -> BatchSizes:
        """DeepSpeed's rule: ``train_batch_size = micro x accumulation x world``; one of the three may be left out."""
        total, micro, steps = (
            config.get(key)
            for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        )
        for value in (total, micro, steps):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"batch size {value!r}", where=where, fix="give a whole number of at least 1")
        if micro is None and total is not None:
            micro = total // (world * (steps or 1))
        if micro is None:
            raise UserError("no batch size", where=where, fix="set train_micro_batch_size_per_gpu")
        if steps is None:
            steps = 1 if total is None else max(1, total // (micro * world))
        if micro < 1 or (total is not None and micro * steps * world != total):
            raise UserError(
                f"train_batch_size {total} is not micro-batch {micro} x accumulation {steps} x {world} processes",
                where=where,
                fix="leave train_batch_size out",
            )
        return cls(micro, steps, world)


@dataclass(frozen=True)
class Schedule:
    """``text``, ``image``: training samples of each set; counts of optimizer steps follow."""

    sizes: BatchSizes
    text: int
    image: int
    epochs: int
    peak: float
    warmup: int

    @classmethod
    def plan(cls, sizes: BatchSizes, text: int, image: int, config: TrainConfig) -> Schedule:
        rough = cls(sizes, text, image, config.epochs, config.learning_rate, warmup=1)
        return cls(sizes, text, image, config.epochs, config.learning_rate,
                   warmup=max(1, round(config.warmup_share * rough.total_steps)))  # fmt: skip

    @property
    def samples_per_epoch(self) -> int:
        """The smaller set's size; where one set is missing, the other's."""
        return min(self.text, self.image) or max(self.text, self.image)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches only; a set smaller than one batch is repeated to fill it."""
        return max(1, self.samples_per_epoch // self.sizes.total)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def learning_rate(self, step: int) -> float:
        """Rate of step ``step`` (from 0): up over ``warmup`` steps, then down in a line that would reach 0 at the end.

        >>> s = Schedule(BatchSizes(1, 1, 1), 10, 0, epochs=1, peak=1.0, warmup=2)
        >>> [s.learning_rate(i) for i in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
        """
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup))

    def describe(self) -> str:
        """What will be trained, in one paragraph."""
        sizes = self.sizes
        return (
            f"data: {self.text} text and {self.image} image samples for training, {self.samples_per_epoch} an epoch\n"
            f"batch: {sizes.micro} x {sizes.accumulation} accumulated x {sizes.world} processes = {sizes.total}\n"
            f"steps: {self.steps_per_epoch} an epoch x {self.epochs} epochs = {self.total_steps}\n"
            f"learning rate: up to {self.peak:g} over {self.warmup} steps, then linearly down to 0"
        )

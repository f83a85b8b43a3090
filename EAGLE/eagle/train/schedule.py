"""Batch sizes, numbers of steps, learning rate, and which samples each step trains on.

Text samples come first, then more and more images. All of it is a pure function of (settings, epoch, step), so an
interrupted run resumes with exactly the samples it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle.train.settings import TrainConfig
from llava.errors import UserError

TEXT, IMAGE = "text", "image"


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
        """DeepSpeed's rule: ``train_batch_size = micro x accumulation x world``; one of the three may be left out.

        Raises:
            UserError: a size is not a whole number above 0, or they contradict each other.
        """
        total, micro, steps = (
            config.get(key)
            for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        )
        for value in (total, micro, steps):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
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


class Item(NamedTuple):
    """Sample ``row`` of the training (or validation) samples of ``source``, and the seed of its noise in this epoch."""

    source: str
    row: int
    noise_seed: int


def image_probability(epoch: int, epochs: int, text_share: float, start: float = 0.0, end: float = 1.0) -> float:
    """Probability that a sample of ``epoch`` (from 0) has an image: 0 at first, then linear from ``start`` (excluded)
    to ``end`` in the last epoch.

    With 40 epochs and ``text_share`` 0.5, as published: epochs 0..19 give 0, epoch 20 gives 1/20, epoch 39 gives 1.

    >>> [image_probability(e, 6, 0.5) for e in range(6)] == [0, 0, 0, 1/3, 2/3, 1]
    True
    >>> [image_probability(e, 2, 0.0, start=0.5, end=0.5) for e in range(2)]
    [0.5, 0.5]
    """
    text_epochs = round(epochs * text_share)
    if epoch < text_epochs:
        return 0.0
    return start + (end - start) * (epoch - text_epochs + 1) / (epochs - text_epochs)


def split_indices(size: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, validation) indices of a data set. A set of one sample trains on it and has no validation."""
    held_out = min(size - 1, max(1, round(size * share))) if share > 0 and size > 1 else 0
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def epoch_items(
    schedule: Schedule, epoch: int, text_share: float, seed: int, image_start: float = 0.0, image_end: float = 1.0
) -> list[Item]:
    """The samples of an epoch in order, for all processes together; a whole number of batches.

    Of the N slots exactly round(p N) are images, at random places; each set is drawn without replacement (and again
    from the start if it is smaller than one batch). Where only one set is given, it is used alone.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    count = schedule.steps_per_epoch * schedule.sizes.total
    if not schedule.text or not schedule.image:
        images = count if schedule.image else 0
    else:
        images = round(count * image_probability(epoch, schedule.epochs, text_share, image_start, image_end))
    is_image = torch.zeros(count, dtype=torch.bool)
    is_image[torch.randperm(count, generator=generator)[:images]] = True
    order = {
        TEXT: torch.randperm(schedule.text, generator=generator).tolist(),
        IMAGE: torch.randperm(schedule.image, generator=generator).tolist(),
    }
    seeds = torch.randint(2**62, (count,), generator=generator).tolist()
    used = {TEXT: 0, IMAGE: 0}
    items = []
    for flag, noise_seed in zip(is_image.tolist(), seeds, strict=True):
        source = IMAGE if flag else TEXT
        items.append(Item(source, order[source][used[source] % len(order[source])], noise_seed))
        used[source] += 1
    return items


def micro_batches(items: list[Item], sizes: BatchSizes, rank: int, first_step: int = 0) -> list[list[Item]]:
    """This process's micro-batches from step ``first_step`` on, ``sizes.accumulation`` of them a step.

    Step s covers items [s * total, (s + 1) * total); within it micro-batch a of process r is piece a * world + r.
    """
    pieces = []
    for start in range(first_step * sizes.total, len(items), sizes.total):
        for part in range(sizes.accumulation):
            at = start + (part * sizes.world + rank) * sizes.micro
            pieces.append(items[at : at + sizes.micro])
    return pieces

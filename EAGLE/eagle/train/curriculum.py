"""Which samples each step trains on: text alone first, then ever more images. Pure functions of (settings, epoch).

Nothing here has state, so an interrupted run goes on with exactly the samples it would have had.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from eagle.train.schedule import BatchSizes, Schedule

TEXT, IMAGE = "text", "image"


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

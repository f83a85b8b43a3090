"""Turns prepared conversations into training samples: one forward of the target for each batch.

Conversations are sorted by length into batches of bounded size and padded on the right. The first batch checks that
padding does not change hidden states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from eagle.families import Target
from eagle.families.template import Prepared, Template, join_images
from eagle.hidden_states.quantise import quantise
from eagle.hidden_states.shards import DTYPES, Sample, Source
from eagle.hidden_states.source import INT8
from llava.errors import UserError
from llava.memory import halved_within_memory

BATCH_TOKENS = {"cpu": 1024, "accelerator": 8192}
"""Default number of tokens in a forward."""
PADDING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative difference of a sequence's hidden states that rounding explains. A wrong position or mask gives at
least 0.5."""


class Reader:
    """Computes samples.

    Args:
        target: the base model.
        template: of the target's family.
        source: states and streams are rounded to its dtype, or states are quantised, on the target's device.
        layers: whose input streams are read too.
        batch_tokens: maximal number of tokens in one forward, with padding; a longer conversation is read alone. None:
            the default for the target's device.
    """

    def __init__(
        self,
        target: Target,
        template: Template,
        source: Source,
        batch_tokens: int | None,
        layers: Sequence[int] = (),
    ) -> None:
        self.target, self.template, self.source, self.layers = target, template, source, layers
        self.batch_tokens = batch_tokens or BATCH_TOKENS["cpu" if target.device.type == "cpu" else "accelerator"]
        self._padding_checked = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def read(self, pieces: Iterable[Sequence[Prepared]]) -> Iterator[list[Sample]]:
        """The samples of each piece, in the order of its items. The next piece is begun before those of one are there.

        Raises:
            UserError: a conversation does not fit into the GPU's memory, even alone.
        """
        asked: deque[tuple[Sequence[Prepared], list[list[int]]]] = deque()

        def groups() -> Iterator[list[Prepared]]:
            for items in pieces:
                lengths = {place: len(item.input_ids) for place, item in enumerate(items)}
                asked.append((items, list(batches(lengths, self.batch_tokens))))
                for places in asked[-1][1]:
                    yield [items[place] for place in places]

        found: dict[int, Sample] = {}
        for samples in self.stream(groups()):
            items, parts = asked[0]
            for place, sample in zip(parts.pop(0), samples, strict=True):
                if sample is None:
                    what = f"a conversation of {len(items[place].input_ids)} tokens does not fit into the GPU's memory"
                    raise UserError(what, items[place].id)
                found[place] = sample
            if not parts:
                yield [found.pop(place) for place in range(len(items))]
                asked.popleft()

    def stream(self, groups: Iterable[Sequence[Prepared]]) -> Iterator[list[Sample | None]]:
        """The samples of each batch: one forward, or those of its halves if it does not fit into memory. None for a
        conversation that does not fit even alone. A GPU has the forward of the next batch before the host waits for
        the copies of one."""
        waiting: list[Place | None] | None = None
        for coming in chain((halved_within_memory(self._begin, items) for items in groups), [None]):
            if waiting is not None:
                yield [None if place is None else place.forward.samples[place.row] for place in waiting]
            waiting = coming

    def _begin(self, items: Sequence[Prepared]) -> list[Place]:
        forward = self._forward(items)
        if not self._padding_checked and len(items) > 1:
            self._check_padding(items[0], forward.samples[0])
        return [Place(forward, row) for row in range(len(items))]

    @torch.inference_mode()
    def _forward(self, items: Sequence[Prepared]) -> Forward:
        """Begins a forward over a batch, and the copies of its results. All sizes are known on the host, which waits
        for none of them."""
        inputs, device = collate(items), self.target.device
        mask = inputs["attention_mask"].bool()  # [B, S]
        image_mask = self.target.image_mask(inputs["input_ids"], inputs) & mask
        kept, images = (part.flatten().nonzero().squeeze(1).to(device) for part in (mask, image_mask))  # [T], [I]
        prefill = self.target.prefill({name: part.to(device) for name, part in inputs.items()}, self.layers)
        states = DTYPES[self.source.dtype]
        hidden = rows_of(prefill.hidden, kept)  # [T, H] of all sequences without their padding
        sent = {"image_features": rows_of(prefill.embeds, images).to(states)}  # [I, H]
        if self.source.hidden_dtype == INT8:
            sent["hidden"], sent["hidden_scale"] = quantise(hidden)
        else:
            sent["hidden"] = hidden.to(states)
        if prefill.streams is not None:
            sent["streams"] = rows_of(prefill.streams, kept).to(states)  # [T, n H]
        grids = [self.template.grids(item.images) for item in items]
        return Forward(items, grids, image_mask, HostCopies(sent, self._streams))

    def _check_padding(self, item: Prepared, padded: Sample) -> None:
        """Compares the shortest sequence of a batch, which has the most padding, with its forward alone."""
        alone, batched = self._forward([item]).samples[0].states(), padded.states()  # [S, H]
        difference = (alone - batched).norm() / alone.norm()
        tolerance = max(PADDING_TOLERANCE[self.target.dtype], PADDING_TOLERANCE[DTYPES[self.source.dtype]] / 10)
        if difference > tolerance:
            raise RuntimeError(
                f"padding changes the hidden states by {float(difference):.3g} (allowed {tolerance:g}); with "
                "--batch-tokens 1 every conversation is read alone"
            )
        self._padding_checked = True


class HostCopies:
    """Copies of tensors in the host's memory. Those from a GPU are made beside its next work, in pinned memory.

    Args:
        tensors: by name.
        streams: for copies, by device; those of further devices are added.
    """

    def __init__(self, tensors: Mapping[str, Tensor], streams: dict[torch.device, torch.cuda.Stream]) -> None:
        self._tensors = list(tensors.values())  # their memory must last until they are copied
        self._copies: dict[str, Tensor] = {}
        self._events: list[torch.cuda.Event] = []
        for device in {each.device for each in self._tensors}:
            own = {name: each for name, each in tensors.items() if each.device == device}
            if device.type != "cuda":
                self._copies |= {name: each.cpu() for name, each in own.items()}
                continue
            if device not in streams:
                streams[device] = torch.cuda.Stream(device)
            streams[device].wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(streams[device]):
                for name, each in own.items():
                    self._copies[name] = torch.empty(each.shape, dtype=each.dtype, pin_memory=True)
                    self._copies[name].copy_(each, non_blocking=True)
            self._events.append(streams[device].record_event())

    def wait(self) -> dict[str, Tensor]:
        """The copies, once they are complete."""
        for event in self._events:
            event.synchronize()
        self._tensors.clear()
        return self._copies


@dataclass
class Forward:
    """A forward over a batch that may still run. ``grids``: of the pictures of each item; ``image_mask`` [B, S]."""

    items: Sequence[Prepared]
    grids: Sequence[Tensor]
    image_mask: Tensor
    copies: HostCopies

    @cached_property
    def samples(self) -> list[Sample]:
        """The sample of each item, once all are on the host."""
        copies, samples, start, first_image = self.copies.wait(), [], 0, 0
        for item, grids, mask in zip(self.items, self.grids, self.image_mask, strict=True):
            own = mask[: len(item.input_ids)]
            end, last_image = start + len(own), first_image + int(own.sum())
            rows = {name: copy[start:end] for name, copy in copies.items() if name != "image_features"}
            features = copies["image_features"][first_image:last_image]
            about = (item.id, item.input_ids, item.loss_mask, own, rows.pop("hidden"), features, grids)
            samples.append(Sample(*about, rows.get("hidden_scale"), rows.get("streams")))
            start, first_image = end, last_image
        return samples


class Place(NamedTuple):
    """The row of a conversation in a forward."""

    forward: Forward
    row: int


def rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """Rows [N, X] of ``values`` [B, S, X], by their numbers [N] in B * S."""
    return values.flatten(0, 1).index_select(0, rows.to(values.device))


def batches(lengths: dict[int, int], batch_tokens: int) -> Iterator[list[int]]:
    """Keys of ``lengths`` in batches of similar length, the shortest first; size x longest <= ``batch_tokens``.

    >>> list(batches({0: 9, 1: 2, 2: 3, 3: 2}, 10))
    [[1, 3, 2], [0]]
    """
    batch: list[int] = []
    for key in sorted(lengths, key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[key] > batch_tokens:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def collate(items: Sequence[Prepared]) -> dict[str, Tensor]:
    """Model inputs of a batch: ``input_ids`` and ``attention_mask`` [B, S], padded on the right, and the image inputs
    of all items."""
    longest = max(len(item.input_ids) for item in items)
    input_ids = torch.zeros(len(items), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for place, item in enumerate(items):
        input_ids[place, : len(item.input_ids)] = item.input_ids
        attention_mask[place, : len(item.input_ids)] = 1
    images = join_images(item.images for item in items)
    return {"input_ids": input_ids, "attention_mask": attention_mask, **images}

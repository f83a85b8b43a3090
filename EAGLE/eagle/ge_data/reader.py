"""Turns prepared conversations into training samples: one forward of the target for each batch.

Conversations are sorted by length into batches of bounded size and padded on the right. The first batch checks that
padding does not change hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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

    def read(self, items: Sequence[Prepared]) -> list[Sample]:
        """The samples of all items, in their order.

        Raises:
            UserError: a conversation does not fit into the GPU's memory, even alone.
        """
        lengths = {place: len(item.input_ids) for place, item in enumerate(items)}
        found: dict[int, Sample] = {}
        for places in batches(lengths, self.batch_tokens):
            batch = [items[place] for place in places]
            for place, item, sample in zip(places, batch, self.samples(batch), strict=True):
                if sample is None:
                    length = len(item.input_ids)
                    raise UserError(f"a conversation of {length} tokens does not fit into the GPU's memory", item.id)
                found[place] = sample
        return [found[place] for place in range(len(items))]

    def samples(self, items: Sequence[Prepared]) -> list[Sample | None]:
        """One forward over a batch, or over its halves if it does not fit into memory. None for a conversation that
        does not fit even alone."""
        return halved_within_memory(self._samples, items)

    def _samples(self, items: Sequence[Prepared]) -> list[Sample]:
        samples = self._forward(items)
        if not self._padding_checked and len(items) > 1:
            self._check_padding(items[0], samples[0])
        return samples

    @torch.inference_mode()
    def _forward(self, items: Sequence[Prepared]) -> list[Sample]:
        inputs = {name: value.to(self.target.device) for name, value in collate(items).items()}
        prefill = self.target.prefill(inputs, self.layers)
        kept, images = inputs["attention_mask"].bool(), prefill.image_mask
        states = DTYPES[self.source.dtype]
        hidden = prefill.hidden[kept.to(prefill.hidden.device)]  # [T, H] of all sequences without their padding
        features = prefill.embeds[(images & kept).to(prefill.embeds.device)].to(states)  # [I, H]
        rows = [images[kept], features]
        rows += quantise(hidden) if self.source.hidden_dtype == INT8 else [hidden.to(states)]
        if prefill.streams is not None:
            rows.append(prefill.streams[kept.to(prefill.streams.device)].to(states))  # [T, n H]
        image_mask, features, hidden, *more = to_host(rows)
        streams = None if prefill.streams is None else more.pop()
        scales = more
        samples, start, first_image = [], 0, 0
        for item in items:
            end = start + len(item.input_ids)
            last_image = first_image + int(image_mask[start:end].sum())
            samples.append(
                Sample(
                    id=item.id,
                    input_ids=item.input_ids,
                    loss_mask=item.loss_mask,
                    image_mask=image_mask[start:end],
                    hidden=hidden[start:end],
                    image_features=features[first_image:last_image],
                    image_grids=self.template.grids(item.images),
                    hidden_scale=scales[0][start:end] if scales else None,
                    streams=None if streams is None else streams[start:end],
                )
            )
            start, first_image = end, last_image
        return samples

    def _check_padding(self, item: Prepared, padded: Sample) -> None:
        """Compares the shortest sequence of a batch, which has the most padding, with its forward alone."""
        alone, batched = (read.states() for read in (self._forward([item])[0], padded))  # [S, H]
        difference = (alone - batched).norm() / alone.norm()
        tolerance = max(PADDING_TOLERANCE[self.target.dtype], PADDING_TOLERANCE[DTYPES[self.source.dtype]] / 10)
        if difference > tolerance:
            raise RuntimeError(
                f"padding changes the hidden states by {float(difference):.3g} (allowed {tolerance:g}); with "
                "--batch-tokens 1 every conversation is read alone"
            )
        self._padding_checked = True


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in the host's memory; from a GPU, all are sent to pinned memory before the host waits."""
    copies = [torch.empty(each.shape, dtype=each.dtype, pin_memory=each.is_cuda) for each in tensors]
    for copy, each in zip(copies, tensors, strict=True):
        copy.copy_(each, non_blocking=True)
    for device in {each.device for each in tensors if each.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


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

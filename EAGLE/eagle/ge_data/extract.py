"""The target reads conversations, a batch at a time, and its hidden states become shards.

The picture goes into the forward pass with the text. Rows of a shard are sorted by length into batches of bounded
size and padded on the right; that padding changes nothing is checked on the first batch. While the target computes,
the next shard's pictures and ids are prepared in threads. With a `Regenerator` the target first answers the questions
itself, one conversation after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eagle.ge_data.annotations import RowFile
from eagle.ge_data.conversations import Unusable, id_to_show, read_conversation
from eagle.ge_data.regenerate import Regenerator
from eagle.ge_data.shards import DTYPES, Sample, ShardInfo, Skipped, Source, write_shard
from eagle.ge_data.source import INT8, Regeneration
from eagle.ge_data.template import Outline, Prepared, Template
from eagle.model.targets import Target
from llava.errors import UserError

THREADS = 4
PADDING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative difference of a row's hidden states that rounding explains; a wrong position or mask gives 0.5 and
more."""

Range = tuple[int, int]
Ready = Prepared | Outline | Skipped
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Selection:
    """What is to be read. ``order``: the shuffled selection, indices into ``rows``."""

    rows: RowFile
    order: Sequence[int]
    image_root: Path
    max_length: int


class Extractor:
    """Makes the shards of a selection.

    Args:
        target: the base model; its padded batches are checked once.
        template: of the target's family.
        selection: rows and their order; a range is a part of the order.
        folder: where shards go.
        source: what the shards say of themselves.
        batch_tokens: most tokens in one forward, padding included; a longer row is read alone.
        regenerator: puts the target's own answers in the place of the data set's; None keeps those.
    """

    def __init__(
        self,
        target: Target,
        template: Template,
        selection: Selection,
        folder: Path,
        source: Source,
        batch_tokens: int,
        regenerator: Regenerator | None = None,
    ) -> None:
        self.target, self.template, self.selection = target, template, selection
        self.folder, self.source, self.batch_tokens = folder, source, batch_tokens
        self.regenerator = regenerator
        self._padding_checked = False

    def run(self, ranges: Iterable[Range], report: Report) -> Iterator[ShardInfo]:
        """Makes a shard for each range, preparing the next one meanwhile.

        Args:
            report: called as ``report(rows, tokens)`` as the work goes on; rows of a range add up to its length.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            waiting: tuple[Range, list[Future[Ready]]] | None = None
            for coming in ranges:
                following = (coming, [pool.submit(self._prepare, index) for index in range(*coming)])
                if waiting is not None:
                    yield self._shard(*waiting, report)
                waiting = following
            if waiting is not None:
                yield self._shard(*waiting, report)

    def _prepare(self, index: int) -> Ready:
        """Row ``index`` of the shuffled selection as model inputs, or as an outline to be answered, or why not."""
        chosen = self.selection
        place = int(chosen.order[index])
        row, number = chosen.rows[place], chosen.rows.numbers[place]
        try:
            conversation = read_conversation(row, number, keep_answers=self.regenerator is None)
            if self.regenerator is not None:
                return self.template.outline(conversation, chosen.image_root, chosen.max_length)
            return self.template.prepare(conversation, chosen.image_root, chosen.max_length)
        except Unusable as unusable:
            return Skipped(number, id_to_show(row, number), unusable.reason)

    def _answered(self, ready: Ready, index: int, report: Report) -> Prepared | Skipped:
        """Row ``index`` of the shuffled selection with the target's own answers, if it waits for them."""
        if not isinstance(ready, Outline):
            return ready
        assert self.regenerator is not None
        number = self.selection.rows.numbers[int(self.selection.order[index])]
        try:
            answered = self.regenerator.answered(ready, number)
        except Unusable as unusable:
            return Skipped(number, ready.id, unusable.reason)
        report(1, int(answered.loss_mask.sum()))
        return answered

    def _shard(self, span: Range, futures: Sequence[Future[Ready]], report: Report) -> ShardInfo:
        outcome: list[Sample | Skipped | None] = [None] * len(futures)
        prepared: dict[int, Prepared] = {}
        for place, future in enumerate(futures):
            result = self._answered(future.result(), span[0] + place, report)
            if isinstance(result, Skipped):
                outcome[place] = result
            else:
                prepared[place] = result
        report(len(futures) - len(prepared), 0)
        for places in batches({place: len(item.input_ids) for place, item in prepared.items()}, self.batch_tokens):
            items = [prepared.pop(place) for place in places]
            for place, sample in zip(places, self.samples(items), strict=True):
                outcome[place] = sample
            report(0 if self.regenerator else len(items), sum(len(item.input_ids) for item in items))
        return self._write(span, outcome)

    def _write(self, span: Range, outcome: Sequence[Sample | Skipped | None]) -> ShardInfo:
        samples, skipped = [], []
        for index, result in zip(range(*span), outcome, strict=True):
            number = self.selection.rows.numbers[int(self.selection.order[index])]
            if isinstance(result, Skipped):
                skipped.append(result)
            elif isinstance(result, Sample) and not result.hidden.isfinite().all():
                skipped.append(Skipped(number, result.id, "not_finite"))
            elif isinstance(result, Sample):
                samples.append((number, result))
        return write_shard(self.folder, *span, samples, skipped, self.source)

    def samples(self, items: Sequence[Prepared]) -> list[Sample]:
        """One forward over a batch; in halves where the GPU's memory does not suffice.

        Raises:
            UserError: not even one conversation fits into the GPU's memory.
        """
        try:
            samples = self._forward(items)
        except torch.OutOfMemoryError:
            samples = []
        if not samples:
            torch.cuda.empty_cache()
            if len(items) == 1:
                length = len(items[0].input_ids)
                raise UserError(f"a conversation of {length} tokens is too much for the GPU's memory", items[0].id)
            half = len(items) // 2
            return self.samples(items[:half]) + self.samples(items[half:])
        if not self._padding_checked and len(items) > 1:
            self._check_padding(items[0], samples[0])
        return samples

    @torch.inference_mode()
    def _forward(self, items: Sequence[Prepared]) -> list[Sample]:
        inputs = {name: value.to(self.target.device) for name, value in collate(items).items()}
        prefill = self.target.prefill(inputs)
        states = DTYPES[self.source.dtype]
        own = self.target.dtype if self.source.hidden_dtype == INT8 else states  # rounded once, not twice
        samples = []
        for row, item in enumerate(items):
            length = len(item.input_ids)
            image_mask = prefill.image_mask[row, :length]
            samples.append(
                Sample(
                    id=item.id,
                    input_ids=item.input_ids,
                    loss_mask=item.loss_mask,
                    image_mask=image_mask.cpu(),
                    hidden=prefill.hidden[row, :length].to("cpu", own),
                    image_features=prefill.embeds[row, :length][image_mask].to("cpu", states),
                )
            )
        return samples

    def _check_padding(self, item: Prepared, padded: Sample) -> None:
        """The shortest row of a batch, which is padded most, must have the states that it has alone."""
        alone = self._forward([item])[0].hidden.float()  # [S, H]
        difference = (alone - padded.hidden.float()).norm() / alone.norm()
        tolerance = max(PADDING_TOLERANCE[self.target.dtype], PADDING_TOLERANCE[DTYPES[self.source.dtype]] / 10)
        if difference > tolerance:
            raise RuntimeError(f"padding changes the hidden states by {float(difference):.3g} (allowed {tolerance:g})")
        self._padding_checked = True


def batches(lengths: dict[int, int], batch_tokens: int) -> Iterator[list[int]]:
    """Keys of ``lengths`` in batches of like length, the shortest first; rows x longest <= ``batch_tokens``.

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
    """Model inputs of a batch: ``input_ids`` and ``attention_mask`` [B, S] padded on the right, image inputs
    joined."""
    longest = max(len(item.input_ids) for item in items)
    input_ids = torch.zeros(len(items), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, item in enumerate(items):
        input_ids[row, : len(item.input_ids)] = item.input_ids
        attention_mask[row, : len(item.input_ids)] = 1
    images: dict[str, list[Tensor]] = {}
    for item in items:
        for name, value in item.images.items():
            images.setdefault(name, []).append(value)
    joined = {name: torch.cat(values) for name, values in images.items()}
    return {"input_ids": input_ids, "attention_mask": attention_mask, **joined}


def source_of(
    target: Target, name: str, hidden_dtype: str | None = None, regeneration: Regeneration | None = None
) -> Source:
    """What shards made by ``target`` say of themselves. States of a 32-bit model are read as bfloat16.

    Args:
        name: folder or hub name of the model.
        hidden_dtype: "int8", or None for the 16 bit dtype.
        regeneration: how answers are made, where they are the target's own.
    """
    stored = target.dtype if target.dtype in DTYPES.values() else torch.bfloat16
    return Source(
        family=target.family,
        model=model_name(name),
        commit=getattr(target.config, "_commit_hash", None),
        dtype=str(stored).removeprefix("torch."),
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        image_token_id=target.config.image_token_id,
        fingerprint=fingerprint(target.model.get_input_embeddings().weight),
        hidden_dtype=hidden_dtype,
        regeneration=regeneration,
    )


def model_name(model: str) -> str:
    """Hub name of a model, or the name of its folder."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def fingerprint(weight: Tensor) -> str:
    """16 hexadecimal digits of a matrix of weights, such as the token embedding [V, H] (rows 3 to 66, as bfloat16):
    tells weights apart, not paths."""
    part = weight.detach()[3:67].to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(part.view(torch.int16).numpy().tobytes()).hexdigest()[:16]

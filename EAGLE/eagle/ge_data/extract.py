"""Makes shards: the target reads conversations, and its hidden states are stored.

While the target computes, threads prepare the next shard's pictures and ids, and write the previous shards. With a
`Regenerator` the target first answers the questions itself.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from eagle.conversations import Unusable
from eagle.decode.self_check import self_check
from eagle.families import Target, load_target
from eagle.families.template import Prepared, PromptOutline, Template
from eagle.ge_data.reader import Reader, batches
from eagle.ge_data.regenerate import Regenerator
from eagle.ge_data.selection import Range, Selection
from eagle.hidden_states.shards import DTYPES, Sample, ShardInfo, Skipped, Source, write_shard
from eagle.hidden_states.source import Regeneration, commit_of, model_name
from llava.errors import UserError

THREADS = 4
WRITERS = 3
"""Shards that are written at the same time at most; each is held in memory until it is complete."""
Ready = Prepared | PromptOutline | Skipped
Report = Callable[[int, int], None]


class Extractor(Reader):
    """Makes the shards of a selection.

    Args:
        target, template, source, batch_tokens: as for `Reader`.
        selection: records and their order, which ranges refer to.
        folder: of the shards.
        regenerator: replaces the answers of the data set by the target's own; None keeps them.
    """

    def __init__(
        self,
        target: Target,
        template: Template,
        selection: Selection,
        folder: Path,
        source: Source,
        batch_tokens: int | None,
        regenerator: Regenerator | None = None,
    ) -> None:
        super().__init__(target, template, source, batch_tokens, source.feature_layers or ())
        self.selection, self.folder, self.regenerator = selection, folder, regenerator

    def run(self, ranges: Iterable[Range], report: Report) -> Iterator[ShardInfo]:
        """Makes a shard for each range.

        Args:
            report: called as ``report(records, tokens)`` during the work; the records of a range add up to its length.
        """
        with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(WRITERS) as writer:
            waiting: tuple[Range, list[Future[Ready]]] | None = None
            written: deque[Future[ShardInfo]] = deque()
            for coming in chain(ranges, [None]):
                following = coming and (coming, [pool.submit(self._prepare, index) for index in range(*coming)])
                if waiting is not None:
                    outcome = self._outcome(*waiting, report)
                    while written and (written[0].done() or len(written) == WRITERS):
                        yield written.popleft().result()
                    written.append(writer.submit(self._write, waiting[0], outcome))
                waiting = following
            while written:
                yield written.popleft().result()

    def _prepare(self, index: int) -> Ready:
        """Record ``index`` of the shuffled selection as model inputs or as questions, or why it cannot be used."""
        if self.regenerator is not None:
            return self.selection.outline(self.template, index)
        return self.selection.prepare(self.template, index)

    def _answered(
        self, span: Range, waiting: dict[int, PromptOutline], report: Report
    ) -> Iterator[tuple[int, Prepared | Skipped]]:
        """The conversations of a range that the target answers itself: their places and results."""
        if self.regenerator is None:
            return
        places = list(waiting)
        numbers = [self.selection.number(span[0] + place) for place in places]
        for found, answered in self.regenerator.answered(list(waiting.values()), numbers):
            place = places[found]
            if isinstance(answered, Unusable):
                yield place, Skipped(numbers[found], waiting[place].id, answered.reason)
                continue
            report(1, int(answered.loss_mask.sum()))
            yield place, answered

    def _outcome(self, span: Range, futures: Sequence[Future[Ready]], report: Report) -> list[Sample | Skipped | None]:
        """The result of each record of a range."""
        outcome: list[Sample | Skipped | None] = [None] * len(futures)
        ready = dict(enumerate(future.result() for future in futures))
        waiting = {place: item for place, item in ready.items() if isinstance(item, PromptOutline)}
        ready.update(self._answered(span, waiting, report))
        prepared: dict[int, Prepared] = {}
        for place, result in ready.items():
            if isinstance(result, Skipped):
                outcome[place] = result
            elif isinstance(result, Prepared):
                prepared[place] = result
        report(len(futures) - len(prepared), 0)
        lengths = {place: len(item.input_ids) for place, item in prepared.items()}
        groups = list(batches(lengths, self.batch_tokens))
        made = self.stream([prepared.pop(place) for place in places] for places in groups)
        for places, samples in zip(groups, made, strict=True):
            for place, sample in zip(places, samples, strict=True):
                number = self.selection.number(span[0] + place)
                outcome[place] = sample or Skipped(number, ready[place].id, "too_large")
            report(0 if self.regenerator else len(places), sum(lengths[place] for place in places))
        return outcome

    def _write(self, span: Range, outcome: Sequence[Sample | Skipped | None]) -> ShardInfo:
        samples, skipped = [], []
        for index, result in zip(range(*span), outcome, strict=True):
            number = self.selection.number(index)
            if isinstance(result, Skipped):
                skipped.append(result)
            elif isinstance(result, Sample) and not result.finite():
                skipped.append(Skipped(number, result.id, "not_finite"))
            elif isinstance(result, Sample):
                samples.append((number, result))
        return write_shard(self.folder, *span, samples, skipped, self.source)


def load_base(name: str, family: str | None, dtype: Any, device: torch.device | str, check: bool) -> Target:
    """Loads the base model of data generation or training.

    Args:
        family: that of --model_type; None for any.
        check: whether to do the self-check of `eagle.decode.self_check`: a draft would learn wrong states in silence.

    Raises:
        UserError: it cannot be loaded, is of another family, or fails the self-check.
    """
    target = load_target(name, dtype=dtype, device_map={"": device})
    if family not in (None, target.family):
        raise UserError(f"--model_type means a model of family {family}, this is {target.family}", name)
    if check:
        self_check(target)
    return target


def source_of(
    target: Target,
    name: str,
    hidden_dtype: Literal["int8"] | None = None,
    regeneration: Regeneration | None = None,
    feature_layers: tuple[int, ...] | None = None,
) -> Source:
    """The source of shards made by ``target``. States of a 32-bit model are stored as bfloat16.

    Args:
        name: folder or hub name of the model.
        hidden_dtype: "int8", or None for 16 bit.
        regeneration: how the target answers itself; None for the answers of the data set.
        feature_layers: whose input streams are stored too.
    """
    stored = target.dtype if target.dtype in DTYPES.values() else torch.bfloat16
    return Source(
        family=target.family,
        model=model_name(name),
        commit=commit_of(name),
        dtype="float16" if stored == torch.float16 else "bfloat16",
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        image_token_id=target.config.image_token_id,
        fingerprint=fingerprint(target.model.get_input_embeddings().weight),
        hidden_dtype=hidden_dtype,
        regeneration=regeneration,
        layer_fingerprint=layer_fingerprint(target.text_model),
        feature_layers=feature_layers,
    )


def check_embedding_scale(target: Target, layers: Sequence[int]) -> None:
    """Raises `UserError` if a draft that reads streams would see other embeddings in training than in decoding, since
    the base scales its own."""
    embedding = target.model.get_input_embeddings()
    weight = cast(Tensor, embedding.weight)
    ids = torch.arange(2, device=weight.device)
    if layers and not torch.equal(embedding(ids), weight[ids]):
        raise UserError(
            f"EAGLE-3 heads of {target.family}, which scales its embeddings, cannot be trained",
            fix="train an MSD draft",
        )


def fingerprint(weight: Tensor) -> str:
    """16 hexadecimal digits that identify a weight matrix, such as the token embedding [V, H]: a hash of its rows 3 to
    66 in bfloat16."""
    return hashlib.sha256(_part(weight)).hexdigest()[:16]


def layer_fingerprint(text_model: Any) -> str:
    """`fingerprint` of all matrices of the last layer, in the order of their names."""
    digest = hashlib.sha256()
    for _, weight in sorted(text_model.layers[-1].named_parameters()):
        if weight.dim() == 2:
            digest.update(_part(weight))
    return digest.hexdigest()[:16]


def _part(weight: Tensor) -> bytes:
    part = weight.detach()[3:67].to("cpu", torch.bfloat16).contiguous()
    return part.view(torch.int16).numpy().tobytes()

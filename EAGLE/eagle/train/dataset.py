"""Data sets of a run: stored hidden states and their checks, the split, and the loader of batches."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from eagle.drafts.compression import Compression
from eagle.families.base_weights import BaseTensors
from eagle.ge_data.extract import fingerprint
from eagle.hidden_states.shards import DTYPES, Index, Sample, ShardDataset
from eagle.train.checkpoint import STATES
from eagle.train.collate import NO_COMPRESSION, Batch, collate
from eagle.train.schedule import IMAGE, TEXT, BatchSizes, Item, Schedule, split_indices
from eagle.train.settings import TrainConfig
from llava.errors import UserError

T = TypeVar("T")
Read = Callable[[Sequence[Any]], list[Sample]]
END: Any = object()
PREFETCH = 2
"""Batches that a thread loads while one is trained on."""
FINGERPRINTED = 67  # rows of the embedding, at least, that `fingerprint` reads


class SampleSet(Protocol):
    """Stored samples (`eagle.hidden_states.shards.ShardDataset`), or prepared conversations
    (`eagle.train.online.OnlineSet`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def describe(self) -> dict[str, Any]:
        """The set's record for provenance."""
        ...


class Samples(Dataset):
    """Samples of both data sets by `Item`. ``sources`` maps a source's name to (data set, usable indices)."""

    def __init__(self, sources: Mapping[str, tuple[SampleSet, Sequence[int]]]) -> None:
        self.sources = sources

    def __getitem__(self, item: Item) -> tuple[Any, int]:
        data, indices = self.sources[item.source]
        return data[indices[item.row]], item.noise_seed


@dataclass(frozen=True)
class TrainingData:
    """Both data sets, split into training and validation.

    Attributes:
        sources: name of a set → (samples, training indices, validation indices).
        read: turns items of the sets into `Sample`s; None if they are samples already.
        run: values of the data that a resumed run must share, beside the numbers of samples.
    """

    sources: dict[str, tuple[SampleSet, list[int], list[int]]]
    read: Read | None = None
    run: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def split(cls, sets: Mapping[str, SampleSet], config: TrainConfig, **more: Any) -> TrainingData:
        parts = {name: split_indices(len(data), config.validation_share, config.seed) for name, data in sets.items()}
        return cls({name: (data, *parts[name]) for name, data in sets.items()}, **more)

    def size(self, source: str) -> int:
        """Number of training samples of a set, 0 if it is not given."""
        return len(self.sources[source][1]) if source in self.sources else 0

    def schedule(self, sizes: BatchSizes, config: TrainConfig) -> Schedule:
        return Schedule.plan(sizes, self.size(TEXT), self.size(IMAGE), config)

    def answers(self) -> Iterator[Any]:
        """The training items of all sets, one after the other."""
        for data, train, _ in self.sources.values():
            for index in train:
                yield data[index]

    @property
    def training(self) -> Samples:
        return Samples({name: (data, train) for name, (data, train, _) in self.sources.items()})

    @property
    def validation(self) -> Samples:
        return Samples({name: (data, held_out) for name, (data, _, held_out) in self.sources.items()})


def load_stored(
    folders: Mapping[str, str | None], hidden_size: int, base: BaseTensors, config: TrainConfig
) -> TrainingData:
    """Loads the given corpora and splits them into training and validation.

    Args:
        folders: of each set, "text" or "image"; None if it is not given.
        hidden_size: of the draft.

    Raises:
        UserError: a corpus is broken, of another base or size, or both are not of one family.
    """
    sets = {name: ShardDataset(folder) for name, folder in folders.items() if folder is not None}
    for data in sets.values():
        if data.meta.hidden_size != hidden_size:
            raise UserError(
                f"hidden states of size {data.meta.hidden_size}, the draft config has {hidden_size}",
                where=data.folder,
                fix="choose the config made for this base model",
            )
        check_model(data, base)
    check_families(list(sets.values()))
    run: dict[str, Any] = {}
    for name, data in sets.items():
        run.update({f"{STATES}{name}_{key}": value for key, value in identity(data.meta).items()})
    return TrainingData.split(sets, config, run=run)


def check_model(data: ShardDataset, base: BaseTensors) -> None:
    """Raises `UserError` if the states come from a model with another token embedding.

    The allocation may have run in another dtype than the base's. Corpora without a fingerprint are accepted.
    """
    meta = data.meta
    own = fingerprint(base.embed[:FINGERPRINTED].to(DTYPES[meta.dtype]))  # bfloat16 also for 32-bit models
    if meta.fingerprint not in (None, own):
        raise UserError(
            f"hidden states of another model ({meta.model}): its embedding is {meta.fingerprint}, the base's is {own}",
            where=data.folder,
            fix="give the base that the states were made with, or make them again",
        )


def check_families(sets: list[ShardDataset]) -> None:
    """Raises `UserError` if two sets are of different families. `check_model` ensures that they are of one model."""
    first = sets[0]
    for data in sets[1:]:
        if data.meta.family != first.meta.family:
            raise UserError(
                f"hidden states of family {data.meta.family}, those in {first.folder} are of {first.meta.family}",
                where=data.folder,
                fix="make both sets with the same base model",
            )


def identity(meta: Index) -> dict[str, str]:
    """Values that a resumed run must find unchanged, as far as they are known.

    ``shards`` is a digest of ranges and sizes, ``sums`` of the checksums of all shards.
    """
    sums = [shard.sha256 for shard in meta.shards]
    known = {
        "fingerprint": meta.fingerprint,
        "hidden_dtype": meta.hidden_dtype or meta.dtype,
        "shards": _digest([[s.start, s.end, s.samples, s.tokens, s.image_tokens] for s in meta.shards]),
        "sums": None if None in sums else _digest(sums),
    }
    return {name: value for name, value in known.items() if value is not None}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _read_and_collate(
    pairs: Sequence[tuple[Any, int]],
    vocab_size: int,
    max_length: int,
    noise: float,
    compression: Compression,
    positions: str,
    image_ids: bool,
    read: Read | None = None,
) -> Batch:
    found, seeds = zip(*pairs, strict=True)
    samples = found if read is None else read(found)
    return collate(samples, vocab_size, max_length, noise, seeds, compression, positions, image_ids)


def batches(
    samples: Samples,
    pieces: Sequence[list[Item]],
    *,
    vocab_size: int,
    max_length: int,
    noise: float = 0.0,
    compression: Compression = NO_COMPRESSION,
    positions: str = "plain",
    image_ids: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
    read: Read | None = None,
) -> Iterator[Batch]:
    """One `Batch` for each of ``pieces``, in order. The next ones are prefetched.

    Args:
        workers: processes that load samples; 0 for a thread of this one.
        read: turns items of ``samples`` into `Sample`s, in this process; None if they are samples already.
    """
    join = partial(
        _read_and_collate,
        vocab_size=vocab_size,
        max_length=max_length,
        noise=noise,
        compression=compression,
        positions=positions,
        image_ids=image_ids,
    )
    load = partial(DataLoader, samples, batch_sampler=pieces, num_workers=workers)
    if read is None:
        loaded = iter(load(collate_fn=join, pin_memory=pin_memory))
        return loaded if workers else prefetch(loaded, PREFETCH)
    return map(partial(join, read=read), load(collate_fn=list))


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """``items`` in their order, with the next ``depth`` prepared in a thread. An exception comes at its item's place.

    The thread uses the current accelerator of the caller, to which pinned memory belongs.
    """
    pool = ThreadPoolExecutor(1, "prefetch", initializer=_same_device())
    try:
        pending = deque(pool.submit(next, items, END) for _ in range(depth))
        while (item := pending.popleft().result()) is not END:
            pending.append(pool.submit(next, items, END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _same_device() -> Callable[[], None]:
    """Initializer that makes a new thread use the accelerator of this one, if one is in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return lambda: None
    number = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(number)

"""Data sets of a run: stored hidden states and their checks, the split, and the loader of batches."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, tee
from typing import Any, Protocol, TypeVar

import torch

from eagle.drafts.compression import Compression
from eagle.families.base_weights import BaseTensors
from eagle.ge_data.extract import fingerprint
from eagle.hidden_states.shards import DTYPES, Index, Sample, ShardDataset
from eagle.train.checkpoint import STATES
from eagle.train.collate import NO_COMPRESSION, Batch, collate
from eagle.train.schedule import IMAGE, TEXT, BatchSizes, Item, Schedule, split_indices
from eagle.train.settings import TrainConfig
from llava.errors import UserError

P = TypeVar("P")
T = TypeVar("T")
Read = Callable[[Iterable[Sequence[Any]]], Iterator[list[Sample]]]
WORKERS = 4
"""Threads that load batches for a GPU."""
FINGERPRINTED = 67  # rows of the embedding, at least, that `fingerprint` reads


class SampleSet(Protocol):
    """Stored samples (`eagle.hidden_states.shards.ShardDataset`), or prepared conversations
    (`eagle.train.online.OnlineSet`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def describe(self) -> dict[str, Any]:
        """The set's record for provenance."""
        ...


class Samples:
    """Samples of both data sets by `Item`, stored ones with their states on disk. ``sources`` maps a source's name to
    (data set, usable indices)."""

    def __init__(self, sources: Mapping[str, tuple[SampleSet, Sequence[int]]]) -> None:
        self.sources = sources

    def __getitem__(self, item: Item) -> tuple[Any, int]:
        data, indices = self.sources[item.source]
        index = indices[item.row]
        return data.stored(index) if isinstance(data, ShardDataset) else data[index], item.noise_seed


@dataclass(frozen=True)
class TrainingData:
    """Both data sets, split into training and validation.

    Attributes:
        sources: name of a set → (samples, training indices, validation indices).
        read: turns pieces, items of the sets, into `Sample`s; None if they are samples already.
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
        for name, (_, train, _) in self.sources.items():
            for row in range(len(train)):
                yield self.training[Item(name, row, 0)][0]

    @property
    def training(self) -> Samples:
        return Samples({name: (data, train) for name, (data, train, _) in self.sources.items()})

    @property
    def validation(self) -> Samples:
        return Samples({name: (data, held_out) for name, (data, _, held_out) in self.sources.items()})


def load_stored(
    folders: Mapping[str, str | None],
    hidden_size: int,
    base: BaseTensors,
    config: TrainConfig,
    layers: Sequence[int] = (),
) -> TrainingData:
    """Loads the given corpora and splits them into training and validation.

    Args:
        folders: of each set, "text" or "image"; None if it is not given.
        hidden_size: of the draft.
        layers: whose input streams the draft reads.

    Raises:
        UserError: a corpus is broken, of another base or size, or both are not of one family.
    """
    sets = {name: ShardDataset(folder, layers) for name, folder in folders.items() if folder is not None}
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
    queries: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    read: Read | None = None,
) -> Iterator[Batch]:
    """One `Batch` for each of ``pieces``, in order. The next ones are prefetched.

    Args:
        workers: threads that load samples; 0 for the default, `WORKERS` for a GPU and one for the CPU.
        pin_memory: whether batches are made in pinned memory, for a GPU.
        read: turns pieces, items of ``samples``, into `Sample`s, in the caller's thread; None if they are samples
            already.
    """

    def load(piece: Sequence[Item]) -> tuple[Sequence[Any], Sequence[int]]:
        found, seeds = zip(*(samples[item] for item in piece), strict=True)
        return found, seeds

    def join(found: Sequence[Any], seeds: Sequence[int]) -> Batch:
        settings = (compression, positions, pin_memory, image_ids, queries)
        return collate(found, vocab_size, max_length, noise, seeds, *settings)

    threads = workers or (WORKERS if pin_memory else 1)
    if read is None:
        return prefetch(lambda piece: join(*load(piece)), pieces, threads)
    loaded, again = tee(prefetch(load, pieces, threads))
    made = read(found for found, _ in loaded)  # may read ahead
    return (join(found, seeds) for found, (_, seeds) in zip(made, again, strict=True))


def prefetch(load: Callable[[P], T], pieces: Iterable[P], threads: int) -> Iterator[T]:
    """``load`` of each piece, in order, with the next ones loaded in threads. An exception comes at its piece's place.

    The threads use the current accelerator of the caller, to which pinned memory belongs.
    """
    pool = ThreadPoolExecutor(threads, "prefetch", initializer=_same_device())
    waiting = iter(pieces)
    try:
        pending = deque(pool.submit(load, piece) for piece in islice(waiting, threads + 1))
        while pending:
            item = pending.popleft().result()
            pending.extend(pool.submit(load, piece) for piece in islice(waiting, 1))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _same_device() -> Callable[[], None]:
    """Initializer that makes a new thread use the accelerator of this one, if one is in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return lambda: None
    number = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(number)

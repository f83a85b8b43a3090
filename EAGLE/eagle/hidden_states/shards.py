"""The corpus on disk: shards of hidden states.

A folder holds ``rows-{start:08d}-{end:08d}.safetensors``, one file for each range ``[start, end)`` of the shuffled
selection, and ``index.json``. A shard appears whole or not at all and is never changed afterwards.

Tensors of a shard, samples one after the other (N samples, T tokens, I image tokens)::

    lengths         [N]    int32   tokens of each sample
    image_lengths   [N]    int32   image tokens of each sample
    input_ids       [T]    int32   one id per image feature
    loss_mask       [T]    uint8   1 on the assistant's tokens
    image_mask      [T]    uint8   1 on image tokens
    hidden          [T, H] 16 bit  the target's hidden states after its final norm; or int8
    hidden_scale    [T]    float32 only with hidden states in int8: what one step is worth in each row
    image_features  [I, H] 16 bit  projected features, as the target's language model reads them
    grid_lengths    [N]    int32   pictures of each sample whose grid is stored
    image_grids     [P, 3] int32   frames, rows and columns of their features; of families with M-RoPE positions

Embeddings of text tokens are not stored: the draft has the table. Image features stay 16 bit: unlike hidden states,
which training blurs with noise anyway, the draft reads the exact ones when it decodes. This module knows no model and
no annotation file.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eagle.hidden_states.index import (
    AGAIN,
    INDEX,
    Index,
    ShardInfo,
    Skipped,
    load_index,
    open_shard,
    read_about,
    sha256,
    shard_info,
    source_in,
)
from eagle.hidden_states.quantise import quantise, restore
from eagle.hidden_states.source import DTYPES, GRIDS_SINCE, INT8, SCHEMA, Source
from llava.errors import UserError
from llava.files import atomic_write

OPEN_SHARDS = 16

__all__ = [
    "DTYPES",
    "Index",
    "OpenShard",
    "Sample",
    "ShardDataset",
    "ShardInfo",
    "Skipped",
    "Source",
    "shard_name",
    "write_shard",
]


@dataclass(frozen=True)
class Sample:
    """One conversation as the target saw it.

    ``input_ids`` [S] int64; ``loss_mask``, ``image_mask`` [S] bool; ``hidden`` [S, H]; ``image_features`` [I, H] in
    the order of the image tokens, I = image_mask.sum(). ``image_grids`` [P, 3] frames, rows and columns of each
    picture's features: their products add up to I; or none, of families without M-RoPE and in shards before schema 3.
    """

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    image_mask: Tensor
    hidden: Tensor
    image_features: Tensor
    image_grids: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int64))


def shard_name(start: int, end: int) -> str:
    """File name of the rows [start, end) of the selection."""
    return f"rows-{start:08d}-{end:08d}.safetensors"


def write_shard(
    folder: Path,
    start: int,
    end: int,
    samples: Sequence[tuple[int, Sample]],
    skipped: Sequence[Skipped],
    source: Source,
) -> ShardInfo:
    """Writes one shard atomically.

    Args:
        start, end: the range of the shuffled selection that the shard answers for.
        samples: (row of the annotation file, sample); hidden states of any float dtype, stored as ``source`` says.
        skipped: the rest of the range.

    Returns:
        The shard's entry in the index, with its checksum.

    Raises:
        UserError: the disk is full or fails.
    """
    items = [sample for _, sample in samples]
    for sample in items:
        _check_sample(sample, source)
    states = DTYPES[source.dtype]
    tensors = {
        "lengths": torch.tensor([len(s.input_ids) for s in items], dtype=torch.int32),
        "image_lengths": torch.tensor([len(s.image_features) for s in items], dtype=torch.int32),
        "input_ids": _flat([s.input_ids for s in items], torch.int32),
        "loss_mask": _flat([s.loss_mask for s in items], torch.uint8),
        "image_mask": _flat([s.image_mask for s in items], torch.uint8),
        **_stored_hidden([s.hidden for s in items], source),
        "image_features": _flat([s.image_features for s in items], states, source.hidden_size),
        "grid_lengths": torch.tensor([len(s.image_grids) for s in items], dtype=torch.int32),
        "image_grids": _flat([s.image_grids for s in items], torch.int32, 3),
    }
    about = {
        "schema": SCHEMA,
        "source": asdict(source),
        "start": start,
        "end": end,
        "samples": [{"row": row, "id": sample.id} for row, sample in samples],
        "skipped": [asdict(row) for row in skipped],
        "tokens": len(tensors["input_ids"]),
        "image_tokens": len(tensors["image_features"]),
    }
    path = folder / shard_name(start, end)
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"msd": json.dumps(about)})
            digest = sha256(temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"shard cannot be written ({error})", path, "make room and start again") from None
    return shard_info(path, about, digest)


class ShardDataset:
    """The samples of a corpus, read from disk when asked for.

    Memory is bounded by the samples that are asked for: only ``OPEN_SHARDS`` files are kept open (mapped). Safe to
    hand to worker processes, and to ask from several threads. ``meta`` is the `Index` (``meta.hidden_size``,
    ``meta.family``, ``meta.samples``, ...).

    Raises:
        UserError: see `load_index`; also where the corpus has no samples.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = load_index(self.folder)
        self._source = self.meta.source
        if not self.meta.samples:
            raise UserError("no samples in this folder, every row was skipped", self.folder, "see skipped.jsonl")
        self._shards = [shard for shard in self.meta.shards if shard.samples]
        self._ends = list(accumulate(shard.samples for shard in self._shards))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, in the order of the shuffled selection; states have the dtype ``meta.dtype``.

        Raises:
            UserError: the shard is broken, or not the one that the index lists.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._ends, index)
        before = self._ends[number - 1] if number else 0
        with self._lock:
            return self._shard(number).sample(index - before)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = OrderedDict(), Lock()

    def lengths(self) -> Tensor:
        """Tokens of each sample [len(self)] int64, without reading any state."""
        return torch.cat([self._opened(shard).lengths for shard in self._shards])

    def image_lengths(self) -> Tensor:
        """Image tokens of each sample [len(self)] int64, without reading any state."""
        return torch.cat([self._opened(shard).image_lengths for shard in self._shards])

    def describe(self) -> dict[str, Any]:
        """What a run that reads this corpus records of it."""
        return {"folder": str(self.folder), "samples": len(self), **asdict(self.meta.source)}

    def _opened(self, shard: ShardInfo) -> OpenShard:
        return OpenShard(self.folder / shard.file, shard, self._source)

    def _shard(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = self._opened(self._shards[number])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[number]


class OpenShard:
    """A mapped shard and where each of its samples begins.

    Raises:
        UserError: it is not the shard that the index lists, or its tensors do not belong together.
    """

    def __init__(self, path: Path, listed: ShardInfo, source: Source) -> None:
        self._path, self._source = path, source
        about = read_about(path)
        if source_in(about, path).differences(source) or shard_info(path, about, listed.sha256) != listed:
            raise UserError("the index does not say what the shard holds", path, f"delete {INDEX}, the shards suffice")
        self._ids = [sample["id"] for sample in about["samples"]]
        self._file = open_shard(path).__enter__()
        for name, (dtype, shape) in _layout(source, len(self._ids), about["tokens"], about["image_tokens"]).items():
            self._check(name, dtype, shape)
        self.lengths, self.image_lengths = (self._file.get_tensor(name).long() for name in ("lengths", "image_lengths"))
        for lengths, total in ((self.lengths, about["tokens"]), (self.image_lengths, about["image_tokens"])):
            if int(lengths.sum()) != total or (lengths < 0).any():
                raise UserError("lengths of the samples do not add up", path, AGAIN)
        self._tokens, self._images = _starts(self.lengths), _starts(self.image_lengths)
        masked = [0, *self._file.get_tensor("image_mask").bool().cumsum(0).tolist()]  # before each token
        if [masked[start] for start in self._tokens] != self._images:
            raise UserError("image tokens of the samples are not as many as their features", path, AGAIN)
        self._grids = [torch.empty(0, 3, dtype=torch.int64)] * len(self._ids)
        if about["schema"] >= GRIDS_SINCE:
            self._grids = self._read_grids()

    def sample(self, index: int) -> Sample:
        rows = slice(self._tokens[index], self._tokens[index + 1])
        features = slice(self._images[index], self._images[index + 1])
        return Sample(
            id=self._ids[index],
            input_ids=self._read("input_ids", rows).long(),
            loss_mask=self._read("loss_mask", rows).bool(),
            image_mask=self._read("image_mask", rows).bool(),
            hidden=self._hidden(rows),
            image_features=self._read("image_features", features),
            image_grids=self._grids[index],
        )

    def _read_grids(self) -> list[Tensor]:
        """Grids [P, 3] int64 of each sample's pictures."""
        self._check("grid_lengths", "I32", [len(self._ids)])
        counts = self._file.get_tensor("grid_lengths").long()
        self._check("image_grids", "I32", [int(counts.sum()), 3])
        ends = counts.cumsum(0).tolist()
        stored = self._file.get_tensor("image_grids").long()
        grids = [stored[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]
        wrong = (counts < 0).any() or (stored < 1).any()
        for own, tokens in zip(grids, self.image_lengths.tolist(), strict=True):
            if wrong or (len(own) and int(own.prod(dim=-1).sum()) != tokens):
                raise UserError("grids of the pictures do not fit their image tokens", self._path, AGAIN)
        return grids

    def _hidden(self, rows: slice) -> Tensor:
        """States of tokens, [S, H] of the source's 16-bit dtype."""
        stored = self._read("hidden", rows)
        if self._source.hidden_dtype != INT8:
            return stored
        return restore(stored, self._read("hidden_scale", rows), DTYPES[self._source.dtype])

    def _read(self, name: str, rows: slice) -> Tensor:
        return self._file.get_slice(name)[rows].clone()  # the clone lets go of the mapped pages

    def _check(self, name: str, dtype: str, shape: list[int]) -> None:
        try:
            tensor = self._file.get_slice(name)
        except SafetensorError:
            raise UserError(f"shard has no tensor {name}", self._path, AGAIN) from None
        found = (tensor.get_dtype(), tensor.get_shape())
        if found != (dtype, shape):
            raise UserError(f"tensor {name} of the shard is {found}, not {(dtype, shape)}", self._path, AGAIN)


def _layout(source: Source, samples: int, tokens: int, images: int) -> dict[str, tuple[str, list[int]]]:
    """Dtype, as safetensors names it, and shape of each tensor of a shard."""
    states, width = {"bfloat16": "BF16", "float16": "F16"}[source.dtype], source.hidden_size
    narrow = source.hidden_dtype == INT8
    return {
        "lengths": ("I32", [samples]),
        "image_lengths": ("I32", [samples]),
        "input_ids": ("I32", [tokens]),
        "loss_mask": ("U8", [tokens]),
        "image_mask": ("U8", [tokens]),
        "hidden": ("I8" if narrow else states, [tokens, width]),
        **({"hidden_scale": ("F32", [tokens])} if narrow else {}),
        "image_features": (states, [images, width]),
    }


def _starts(lengths: Tensor) -> list[int]:
    return list(accumulate(lengths.tolist(), initial=0))


def _flat(parts: Sequence[Tensor], dtype: torch.dtype, width: int | None = None) -> Tensor:
    if not parts:
        return torch.empty((0,) if width is None else (0, width), dtype=dtype)
    return torch.cat([part.detach().to("cpu", dtype) for part in parts]).contiguous()


def _stored_hidden(hidden: Sequence[Tensor], source: Source) -> dict[str, Tensor]:
    """Hidden states of all samples, each [S, H], as the shard holds them."""
    if source.hidden_dtype != INT8:
        return {"hidden": _flat(hidden, DTYPES[source.dtype], source.hidden_size)}
    rows = [quantise(states) for states in hidden]
    return {
        "hidden": _flat([values for values, _ in rows], torch.int8, source.hidden_size),
        "hidden_scale": _flat([scales for _, scales in rows], torch.float32),
    }


def _check_sample(sample: Sample, source: Source) -> None:
    """A sample of wrong shape is a defect of the program, so a ValueError."""
    tokens, width = len(sample.input_ids), source.hidden_size
    wanted = {
        "loss_mask": (tokens,),
        "image_mask": (tokens,),
        "hidden": (tokens, width),
        "image_features": (int(sample.image_mask.sum()), width),
    }
    for name, shape in wanted.items():
        if tuple(getattr(sample, name).shape) != shape:
            raise ValueError(f"sample {sample.id}: {name} is {tuple(getattr(sample, name).shape)}, expected {shape}")
    tokens_of_grids = int(sample.image_grids.prod(dim=-1).sum())
    if len(sample.image_grids) and tokens_of_grids != len(sample.image_features):
        raise ValueError(f"sample {sample.id}: grids of {tokens_of_grids} of {len(sample.image_features)} image tokens")

"""A corpus on disk: shards of hidden states.

A folder has ``rows-{start:08d}-{end:08d}.safetensors``, one file for each range ``[start, end)`` of the shuffled
selection, and ``index.json``. A shard is written atomically and never changed.

Tensors of a shard, with its samples concatenated (N samples, T tokens, I image tokens, P pictures)::

    lengths         [N]    int32   tokens of each sample
    image_lengths   [N]    int32   image tokens of each sample
    input_ids       [T]    int32   one id per image feature
    loss_mask       [T]    uint8   1 for the assistant's tokens
    image_mask      [T]    uint8   1 for image tokens
    hidden          [T, H] 16 bit  the target's hidden states after its final norm; or int8
    hidden_scale    [T]    float32 the scale of each row, only with int8 states
    image_features  [I, H] 16 bit  projected features, as the target's language model reads them
    grid_lengths    [N]    int32   number of stored grids of each sample
    image_grids     [P, 3] int32   frames, rows and columns of a picture's features, for M-RoPE positions

Embeddings of text tokens are not stored: the draft has the embedding table. Image features stay 16 bit, since the draft
reads the exact ones when it decodes, while noise is added to hidden states in training anyway.
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
    INDEX,
    MAKE_AGAIN,
    Index,
    ShardHeader,
    ShardInfo,
    Skipped,
    StoredSample,
    load_index,
    open_shard,
    read_header,
    sha256,
)
from eagle.hidden_states.quantise import dequantise, quantise
from eagle.hidden_states.source import GRIDS_SINCE, INT8, SCHEMA, Source
from llava.errors import UserError
from llava.files import atomic_write

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OPEN_SHARDS = 16
"""Number of files that a `ShardDataset` keeps open."""

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
    """One conversation as the target read it.

    ``input_ids`` [S] int64; ``loss_mask``, ``image_mask`` [S] bool; ``hidden`` [S, H]; ``image_features`` [I, H] in
    the order of the image tokens, I = image_mask.sum(). ``image_grids`` [P, 3] frames, rows and columns of each
    picture's features, whose products add up to I; [0, 3] for families without M-RoPE and in shards before schema 3.
    ``streams`` [S, n * H] those that enter chosen layers; None in shards.
    """

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    image_mask: Tensor
    hidden: Tensor
    image_features: Tensor
    image_grids: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int64))
    streams: Tensor | None = None


def shard_name(start: int, end: int) -> str:
    """File name of the shard of [start, end)."""
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
        start, end: the range of the shuffled selection that the shard covers.
        samples: (number of the record in the annotation file, sample); hidden states of any float dtype, which are
            stored as ``source`` says.
        skipped: the other records of the range.

    Returns:
        The shard's entry in the index, with checksum.

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
    header = ShardHeader(
        schema=SCHEMA,
        source=source,
        start=start,
        end=end,
        samples=[StoredSample(number, sample.id) for number, sample in samples],
        skipped=list(skipped),
        tokens=len(tensors["input_ids"]),
        image_tokens=len(tensors["image_features"]),
    )
    path = folder / shard_name(start, end)
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"msd": json.dumps(asdict(header))})
            digest = sha256(temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"shard cannot be written ({error})", path, "free some space and start again") from None
    return header.info(path, digest)


class ShardDataset:
    """The samples of a corpus, read from disk on access.

    Only `OPEN_SHARDS` files are kept open (memory-mapped). Safe to pass to worker processes and to use from several
    threads. ``meta`` is the `Index` (``meta.hidden_size``, ``meta.family``, ``meta.samples``, ...).

    Raises:
        UserError: see `load_index`; also if the corpus has no samples.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = load_index(self.folder)
        self._source = self.meta.source
        if not self.meta.samples:
            raise UserError("no samples in this folder, every record was skipped", self.folder, "see skipped.jsonl")
        self._shards = [shard for shard in self.meta.shards if shard.samples]
        self._ends = list(accumulate(shard.samples for shard in self._shards))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, in the order of the shuffled selection. Its states have the dtype ``meta.dtype``.

        Raises:
            UserError: the shard is damaged, or not the one that the index lists.
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
        """Tokens of each sample [len(self)] int64, without reading states."""
        return torch.cat([self._opened(shard).lengths for shard in self._shards])

    def image_lengths(self) -> Tensor:
        """Image tokens of each sample [len(self)] int64, without reading states."""
        return torch.cat([self._opened(shard).image_lengths for shard in self._shards])

    def describe(self) -> dict[str, Any]:
        """What a run that reads this corpus records about it."""
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
    """A memory-mapped shard.

    Raises:
        UserError: it is not the shard that the index lists, or its tensors do not fit together.
    """

    def __init__(self, path: Path, listed: ShardInfo, source: Source) -> None:
        self._path, self._source = path, source
        header = read_header(path)
        if header.source.differences(source) or header.info(path, listed.sha256) != listed:
            raise UserError("the index contradicts the shard", path, f"delete {INDEX}, the shards suffice")
        self._ids = [sample.id for sample in header.samples]
        self._file = open_shard(path).__enter__()
        for name, (dtype, shape) in _layout(source, len(self._ids), header.tokens, header.image_tokens).items():
            self._check(name, dtype, shape)
        self.lengths, self.image_lengths = (self._file.get_tensor(name).long() for name in ("lengths", "image_lengths"))
        for lengths, total in ((self.lengths, header.tokens), (self.image_lengths, header.image_tokens)):
            if int(lengths.sum()) != total or (lengths < 0).any():
                raise UserError("lengths of the samples do not add up", path, MAKE_AGAIN)
        self._token_starts, self._image_starts = _starts(self.lengths), _starts(self.image_lengths)
        masked = [0, *self._file.get_tensor("image_mask").bool().cumsum(0).tolist()]  # before each token
        if [masked[start] for start in self._token_starts] != self._image_starts:
            raise UserError("numbers of image tokens and image features differ", path, MAKE_AGAIN)
        self._grids = [torch.empty(0, 3, dtype=torch.int64)] * len(self._ids)
        if header.schema >= GRIDS_SINCE:
            self._grids = self._read_grids()

    def sample(self, index: int) -> Sample:
        tokens = slice(self._token_starts[index], self._token_starts[index + 1])
        images = slice(self._image_starts[index], self._image_starts[index + 1])
        return Sample(
            id=self._ids[index],
            input_ids=self._read("input_ids", tokens).long(),
            loss_mask=self._read("loss_mask", tokens).bool(),
            image_mask=self._read("image_mask", tokens).bool(),
            hidden=self._hidden(tokens),
            image_features=self._read("image_features", images),
            image_grids=self._grids[index],
        )

    def _read_grids(self) -> list[Tensor]:
        """Grids [P, 3] int64 of the pictures of each sample."""
        self._check("grid_lengths", "I32", [len(self._ids)])
        counts = self._file.get_tensor("grid_lengths").long()
        self._check("image_grids", "I32", [int(counts.sum()), 3])
        ends = counts.cumsum(0).tolist()
        stored = self._file.get_tensor("image_grids").long()
        grids = [stored[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]
        wrong = (counts < 0).any() or (stored < 1).any()
        for own, tokens in zip(grids, self.image_lengths.tolist(), strict=True):
            if wrong or (len(own) and int(own.prod(dim=-1).sum()) != tokens):
                raise UserError("grids of the pictures contradict their image tokens", self._path, MAKE_AGAIN)
        return grids

    def _hidden(self, rows: slice) -> Tensor:
        """States [S, H] in the source's 16-bit dtype."""
        stored = self._read("hidden", rows)
        if self._source.hidden_dtype != INT8:
            return stored
        return dequantise(stored, self._read("hidden_scale", rows), DTYPES[self._source.dtype])

    def _read(self, name: str, rows: slice) -> Tensor:
        return self._file.get_slice(name)[rows].clone()  # the clone releases the mapped pages

    def _check(self, name: str, dtype: str, shape: list[int]) -> None:
        try:
            tensor = self._file.get_slice(name)
        except SafetensorError:
            raise UserError(f"shard has no tensor {name}", self._path, MAKE_AGAIN) from None
        found = (tensor.get_dtype(), tensor.get_shape())
        if found != (dtype, shape):
            raise UserError(f"tensor {name} of the shard is {found}, not {(dtype, shape)}", self._path, MAKE_AGAIN)


def _layout(source: Source, samples: int, tokens: int, images: int) -> dict[str, tuple[str, list[int]]]:
    """Dtype (as safetensors names it) and shape of each tensor of a shard."""
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
    """Hidden states of all samples, each [S, H], as they are stored."""
    if source.hidden_dtype != INT8:
        return {"hidden": _flat(hidden, DTYPES[source.dtype], source.hidden_size)}
    parts = [quantise(states) for states in hidden]
    return {
        "hidden": _flat([values for values, _ in parts], torch.int8, source.hidden_size),
        "hidden_scale": _flat([scales for _, scales in parts], torch.float32),
    }


def _check_sample(sample: Sample, source: Source) -> None:
    """Raises ValueError for a sample of wrong shape, which is a bug."""
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

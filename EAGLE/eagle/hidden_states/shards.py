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
    stream_{i}      [T, H] 16 bit  the stream that enters layer i of the target, for each of the source's feature_layers
    image_features  [I, H] 16 bit  projected features, as the target's language model reads them
    grid_lengths    [N]    int32   number of stored grids of each sample
    image_grids     [P, 3] int32   frames, rows and columns of a picture's features, for M-RoPE positions

Embeddings of text tokens are not stored: the draft has the embedding table. Image features stay 16 bit, since the draft
reads the exact ones when it decodes, while noise is added to hidden states in training anyway. Streams stay 16 bit too:
a few of their values are so large that one scale for a row would round the others away.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
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
    read_header,
)
from eagle.hidden_states.quantise import dequantise, quantise
from eagle.hidden_states.source import GRIDS_SINCE, INT8, SCHEMA, Source
from eagle.hidden_states.tensor_file import DTYPES as STORED_DTYPES
from eagle.hidden_states.tensor_file import Rows, read_into, tensor_places, write_tensors
from llava.errors import UserError
from llava.files import atomic_write

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = {"input_ids": torch.int32, "loss_mask": torch.uint8, "image_mask": torch.uint8}
"""Tensors of a sample that are read before its states."""

__all__ = [
    "DTYPES",
    "DiskSample",
    "Index",
    "Sample",
    "ShardDataset",
    "ShardInfo",
    "ShardReader",
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
    ``hidden_scale`` [S] float32 if the states are quantised already, None otherwise. ``streams`` [S, n * H] those that
    enter chosen layers, None if there are none.
    """

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    image_mask: Tensor
    hidden: Tensor
    image_features: Tensor
    image_grids: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int64))
    hidden_scale: Tensor | None = None
    streams: Tensor | None = None

    @property
    def width(self) -> int:
        return self.hidden.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def streams_shape(self) -> tuple[int, torch.dtype] | None:
        """Values of a row of the streams, and their dtype. None without streams."""
        return None if self.streams is None else (self.streams.shape[1], self.streams.dtype)

    def hidden_into(self, out: Tensor, scale: Tensor | None = None) -> None:
        """Writes the states of the first tokens to ``out`` [<= S, H], and the scales of 8-bit ones to ``scale``."""
        out.copy_(self.hidden[: len(out)])
        if scale is not None:
            assert self.hidden_scale is not None
            scale.copy_(self.hidden_scale[: len(out)])

    def streams_into(self, out: Tensor) -> None:
        """Writes the streams of the first tokens to ``out`` [<= S, n * H]."""
        assert self.streams is not None
        out.copy_(self.streams[: len(out)])

    def features_into(self, out: Tensor) -> None:
        """Writes the first image features to ``out`` [<= I, H]."""
        out.copy_(self.image_features[: len(out)])

    def load(self) -> Sample:
        return self

    def states(self) -> Tensor:
        """The hidden states [S, H] in float32."""
        scale = self.hidden_scale
        return self.hidden.float() if scale is None else dequantise(self.hidden, scale, torch.float32)

    def finite(self) -> bool:
        """Whether all states are finite. The scale of a row that is not is not either."""
        states = (self.hidden if self.hidden_scale is None else self.hidden_scale, self.streams)
        return all(bool(part.isfinite().all()) for part in states if part is not None)


@dataclass(frozen=True)
class DiskSample:
    """A `Sample` whose states are still on disk, to be read straight into a batch. ``width``, ``dtype``: of the states
    when they are read. ``hidden_scale``: None for 16-bit states. ``images``: number of image features. ``streams``: of
    each layer."""

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    image_mask: Tensor
    image_grids: Tensor
    width: int
    dtype: torch.dtype
    hidden: Rows
    hidden_scale: Rows | None
    features: Rows
    images: int
    streams: tuple[Rows, ...]

    @property
    def streams_shape(self) -> tuple[int, torch.dtype] | None:
        """As of `Sample`."""
        return (len(self.streams) * self.width, self.dtype) if self.streams else None

    def hidden_into(self, out: Tensor, scale: Tensor | None = None) -> None:
        """Reads the states of the first tokens into ``out`` [<= S, H]. 8-bit ones stay as they are if there is a
        ``scale`` for their scales."""
        if self.hidden_scale is None:
            self.hidden.into(out)
        elif scale is not None:
            self.hidden.into(out)
            self.hidden_scale.into(scale)
        else:
            scales = self.hidden_scale.into(torch.empty(len(out)))
            out.copy_(dequantise(self.hidden.into(torch.empty(out.shape, dtype=torch.int8)), scales, self.dtype))

    def streams_into(self, out: Tensor) -> None:
        """Reads the streams of the first tokens into ``out`` [<= S, n * H]."""
        for rows, part in zip(self.streams, out.split(self.width, dim=-1), strict=True):
            part.copy_(rows.into(torch.empty(part.shape, dtype=self.dtype)))

    def features_into(self, out: Tensor) -> None:
        """Reads the first image features into ``out`` [<= I, H]."""
        self.features.into(out)

    def load(self) -> Sample:
        hidden = torch.empty(len(self.input_ids), self.width, dtype=self.dtype)
        features = torch.empty(self.images, self.width, dtype=self.dtype)
        self.hidden_into(hidden)
        self.features_into(features)
        sample = Sample(self.id, self.input_ids, self.loss_mask, self.image_mask, hidden, features, self.image_grids)
        if self.streams_shape is None:
            return sample
        streams = torch.empty(len(hidden), self.streams_shape[0], dtype=self.dtype)
        self.streams_into(streams)
        return replace(sample, streams=streams)


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
    states, width = DTYPES[source.dtype], source.hidden_size
    tensors = {
        "lengths": [torch.tensor([len(s.input_ids) for s in items], dtype=torch.int32)],
        "image_lengths": [torch.tensor([len(s.image_features) for s in items], dtype=torch.int32)],
        "input_ids": _parts([s.input_ids for s in items], torch.int32),
        "loss_mask": _parts([s.loss_mask for s in items], torch.uint8),
        "image_mask": _parts([s.image_mask for s in items], torch.uint8),
        **_stored_hidden(items, source),
        **_stored_streams(items, source),
        "image_features": _parts([s.image_features for s in items], states, width),
        "grid_lengths": [torch.tensor([len(s.image_grids) for s in items], dtype=torch.int32)],
        "image_grids": _parts([s.image_grids for s in items], torch.int32, 3),
    }
    header = ShardHeader(
        schema=SCHEMA,
        source=source,
        start=start,
        end=end,
        samples=[StoredSample(number, sample.id) for number, sample in samples],
        skipped=list(skipped),
        tokens=sum(len(s.input_ids) for s in items),
        image_tokens=sum(len(s.image_features) for s in items),
    )
    path = folder / shard_name(start, end)
    try:
        with atomic_write(path) as temporary:
            digest = write_tensors(temporary, tensors, {"msd": json.dumps(asdict(header))})
    except OSError as error:
        raise UserError(f"shard cannot be written ({error})", path, "free some space and start again") from None
    return header.info(path, digest)


class ShardDataset:
    """The samples of a corpus, read from disk on access.

    The places of all samples are kept once their shard has been opened; states are read by offset, so no file stays
    open. May be used by several threads and processes. ``meta`` is the `Index` (``meta.hidden_size``, ...).

    Args:
        layers: whose input streams are read too, in this order.

    Raises:
        UserError: see `load_index`; also if the corpus has no samples, or lacks a layer.
    """

    def __init__(self, folder: str | Path, layers: Sequence[int] = ()) -> None:
        self.folder, self.layers = Path(folder), tuple(layers)
        self.meta = load_index(self.folder)
        self._source = self.meta.source
        if not set(self.layers) <= set(self._source.feature_layers or ()):
            wanted, stored = (
                ", ".join(map(str, each or ["no layer"])) for each in (self.layers, self._source.feature_layers)
            )
            raise UserError(
                f"the draft reads the inputs of layers {wanted}, stored are those of {stored}",
                self.folder,
                "make the hidden states with --feature-layers, or train with --online",
            )
        if not self.meta.samples:
            raise UserError("no samples in this folder, every record was skipped", self.folder, "see skipped.jsonl")
        self._shards = [shard for shard in self.meta.shards if shard.samples]
        self._ends = list(accumulate(shard.samples for shard in self._shards))
        self._readers: dict[int, ShardReader] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, in the order of the shuffled selection. Its states have the dtype ``meta.dtype``.

        Raises:
            UserError: the shard is damaged, or not the one that the index lists.
        """
        return self.stored(index).load()

    def stored(self, index: int) -> DiskSample:
        """As ``self[index]``, with the states left on disk."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._ends, index)
        return self._reader(number).sample(index - (self._ends[number - 1] if number else 0))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> Tensor:
        """Tokens of each sample [len(self)] int64, without reading states."""
        return torch.cat([self._reader(number).lengths for number in range(len(self._shards))])

    def image_lengths(self) -> Tensor:
        """Image tokens of each sample [len(self)] int64, without reading states."""
        return torch.cat([self._reader(number).image_lengths for number in range(len(self._shards))])

    def describe(self) -> dict[str, Any]:
        """What a run that reads this corpus records about it."""
        return {"folder": str(self.folder), "samples": len(self), **asdict(self.meta.source)}

    def _reader(self, number: int) -> ShardReader:
        if number not in self._readers:
            shard = self._shards[number]
            self._readers[number] = ShardReader(self.folder / shard.file, shard, self._source, self.layers)
        return self._readers[number]


class ShardReader:
    """A shard whose samples are read by offset. The file is open only while something is read.

    Args:
        layers: whose streams its samples have.

    Raises:
        UserError: it is not the shard that the index lists, or its tensors do not fit together.
    """

    def __init__(self, path: Path, listed: ShardInfo, source: Source, layers: Sequence[int] = ()) -> None:
        self._path, self._source, self._layers = path, source, layers
        header = read_header(path)
        if header.source.differences(source) or header.info(path, listed.sha256) != listed:
            raise UserError("the index contradicts the shard", path, f"delete {INDEX}, the shards suffice")
        self._ids = [sample.id for sample in header.samples]
        self._tensors = tensor_places(path)
        for name, (dtype, shape) in _layout(source, len(self._ids), header.tokens, header.image_tokens).items():
            self._check(name, dtype, shape)
        self.lengths, self.image_lengths = (self._whole(name).long() for name in ("lengths", "image_lengths"))
        for lengths, total in ((self.lengths, header.tokens), (self.image_lengths, header.image_tokens)):
            if int(lengths.sum()) != total or (lengths < 0).any():
                raise UserError("lengths of the samples do not add up", path, MAKE_AGAIN)
        self._token_starts, self._image_starts = _starts(self.lengths), _starts(self.image_lengths)
        before = torch.zeros(header.tokens + 1, dtype=torch.int64)  # image tokens before each token
        torch.cumsum(self._whole("image_mask").bool(), 0, out=before[1:])
        if before[self._token_starts].tolist() != self._image_starts:
            raise UserError("numbers of image tokens and image features differ", path, MAKE_AGAIN)
        self._grids = [torch.empty(0, 3, dtype=torch.int64)] * len(self._ids)
        if header.schema >= GRIDS_SINCE:
            self._grids = self._read_grids()

    def sample(self, index: int) -> DiskSample:
        tokens, images = int(self.lengths[index]), int(self.image_lengths[index])
        start, first_image = self._token_starts[index], self._image_starts[index]

        small = {name: torch.empty(tokens, dtype=dtype) for name, dtype in SMALL.items()}
        read_into(self._path, ((self._offset(name, start, part.dtype), part) for name, part in small.items()))
        states, scale = DTYPES[self._source.dtype], None
        if self._source.hidden_dtype == INT8:
            scale = self._rows("hidden_scale", start, torch.float32)
        return DiskSample(
            id=self._ids[index],
            input_ids=small["input_ids"].long(),
            loss_mask=small["loss_mask"].bool(),
            image_mask=small["image_mask"].bool(),
            image_grids=self._grids[index],
            width=self._source.hidden_size,
            dtype=states,
            hidden=self._rows("hidden", start, states if scale is None else torch.int8),
            hidden_scale=scale,
            features=self._rows("image_features", first_image, states),
            images=images,
            streams=tuple(self._rows(stream_name(layer), start, states) for layer in self._layers),
        )

    def _read_grids(self) -> list[Tensor]:
        """Grids [P, 3] int64 of the pictures of each sample."""
        self._check("grid_lengths", "I32", [len(self._ids)])
        counts = self._whole("grid_lengths").long()
        self._check("image_grids", "I32", [int(counts.sum()), 3])
        ends = counts.cumsum(0).tolist()
        stored = self._whole("image_grids").long()
        grids = [stored[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]
        wrong = (counts < 0).any() or (stored < 1).any()
        for own, tokens in zip(grids, self.image_lengths.tolist(), strict=True):
            if wrong or (len(own) and int(own.prod(dim=-1).sum()) != tokens):
                raise UserError("grids of the pictures contradict their image tokens", self._path, MAKE_AGAIN)
        return grids

    def _rows(self, name: str, start: int, dtype: torch.dtype) -> Rows:
        return Rows(self._path, self._offset(name, start, dtype))

    def _offset(self, name: str, start: int, dtype: torch.dtype) -> int:
        """Where row ``start`` of a tensor begins."""
        place = self._tensors[name]
        return place.offset + start * math.prod(place.shape[1:]) * dtype.itemsize

    def _whole(self, name: str) -> Tensor:
        place = self._tensors[name]
        dtype = STORED_DTYPES[place.dtype]
        return self._rows(name, 0, dtype).into(torch.empty(place.shape, dtype=dtype))

    def _check(self, name: str, dtype: str, shape: list[int]) -> None:
        if name not in self._tensors:
            raise UserError(f"shard has no tensor {name}", self._path, MAKE_AGAIN)
        found = (self._tensors[name].dtype, self._tensors[name].shape)
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
        **{stream_name(layer): (states, [tokens, width]) for layer in source.feature_layers or ()},
        "image_features": (states, [images, width]),
    }


def stream_name(layer: int) -> str:
    """The tensor of a layer's input stream in a shard."""
    return f"stream_{layer}"


def _starts(lengths: Tensor) -> list[int]:
    return list(accumulate(lengths.tolist(), initial=0))


def _parts(parts: Sequence[Tensor], dtype: torch.dtype, width: int | None = None) -> list[Tensor]:
    empty = torch.empty((0,) if width is None else (0, width), dtype=dtype)
    return [part.detach().to("cpu", dtype) for part in parts] or [empty]


def _stored_hidden(samples: Sequence[Sample], source: Source) -> dict[str, list[Tensor]]:
    """Hidden states of all samples as they are stored."""
    if source.hidden_dtype != INT8:
        return {"hidden": _parts([s.hidden for s in samples], DTYPES[source.dtype], source.hidden_size)}
    pairs = [quantise(s.hidden) if s.hidden_scale is None else (s.hidden, s.hidden_scale) for s in samples]
    return {
        "hidden": _parts([values for values, _ in pairs], torch.int8, source.hidden_size),
        "hidden_scale": _parts([scales for _, scales in pairs], torch.float32),
    }


def _stored_streams(samples: Sequence[Sample], source: Source) -> dict[str, list[Tensor]]:
    """The streams of all samples, a tensor for each layer."""
    width, dtype = source.hidden_size, DTYPES[source.dtype]
    joined = [sample.streams for sample in samples if sample.streams is not None]
    return {
        stream_name(layer): _parts([each[:, place * width : (place + 1) * width] for each in joined], dtype, width)
        for place, layer in enumerate(source.feature_layers or ())
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
    wanted |= {"streams": (tokens, len(source.feature_layers) * width)} if source.feature_layers else {}
    for name, shape in wanted.items():
        found = tuple(getattr(getattr(sample, name), "shape", ()))
        if found != shape:
            raise ValueError(f"sample {sample.id}: {name} is {found}, expected {shape}")
    tokens_of_grids = int(sample.image_grids.prod(dim=-1).sum())
    if len(sample.image_grids) and tokens_of_grids != len(sample.image_features):
        raise ValueError(f"sample {sample.id}: grids of {tokens_of_grids} of {len(sample.image_features)} image tokens")

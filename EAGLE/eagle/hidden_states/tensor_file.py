"""Safetensors files read by offset into tensors that exist already, and written in one pass with their checksum."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from llava.errors import UserError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Names of dtypes in the header of a file."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
BLOCK = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where a tensor is in its file. ``offset``: of its first byte."""

    dtype: str
    shape: list[int]
    offset: int


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor in a file, from one row on. ``offset``: of the first byte."""

    path: Path
    offset: int

    def into(self, out: Tensor) -> Tensor:
        """Reads as many rows as ``out`` has, which is contiguous and of the file's dtype; returns ``out``.

        Raises:
            UserError: the file cannot be read, or ends before.
        """
        read_into(self.path, [(self.offset, out)])
        return out


def read_into(path: Path, parts: Iterable[tuple[int, Tensor]]) -> None:
    """Fills contiguous tensors with the bytes of a file, each from its offset on.

    Raises:
        UserError: the file cannot be read, or ends before.
    """
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            for offset, out in parts:
                rest = _bytes(out)
                while rest:
                    if not (count := os.preadv(file, [rest], offset)):
                        raise UserError("shard ends too early", path, "delete it and run the allocation again")
                    rest, offset = rest[count:], offset + count
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"shard cannot be read ({error.strerror})", path, "see the disk or share") from None


def tensor_places(path: Path) -> dict[str, Place]:
    """The places of all tensors of a valid safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: Place(about["dtype"], about["shape"], 8 + size + about["data_offsets"][0])
        for name, about in header.items()
        if name != "__metadata__"
    }


def write_tensors(path: Path, tensors: Mapping[str, Sequence[Tensor]], metadata: Mapping[str, str]) -> str:
    """Writes a safetensors file; returns its SHA-256.

    Args:
        tensors: each in one or more parts, which are joined along the first dimension.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    wide_first = sorted(tensors, key=lambda name: -tensors[name][0].dtype.itemsize)  # each tensor is aligned
    end = 0
    for name in wide_first:
        parts = tensors[name]
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
        start, end = end, end + math.prod(shape) * parts[0].dtype.itemsize
        header[name] = {"dtype": NAMES[parts[0].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start_of_file: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for block in chain(start_of_file, _blocks(tensors, wide_first)):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _blocks(tensors: Mapping[str, Sequence[Tensor]], names: Sequence[str]) -> Iterator[memoryview]:
    """The bytes of the tensors' parts, in pieces that stay in the processor's cache from checksum to write."""
    for name in names:
        for part in tensors[name]:
            whole = _bytes(part.contiguous())
            yield from (whole[start : start + BLOCK] for start in range(0, len(whole), BLOCK))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

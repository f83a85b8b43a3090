"""Names and shapes of the tensors in weight files, without reading the tensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from llava.errors import UserError

Shapes = dict[str, tuple[int, ...]]
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header


def read_shapes(path: Path) -> Shapes:
    """Tensor name → shape of one file, .safetensors or .bin.

    Raises:
        UserError: the file is damaged or shorter than its header says.
    """
    return _safetensors_shapes(path) if path.suffix == ".safetensors" else _bin_shapes(path)


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of all tensors."""
    return sum(prod(shape) for shape in shapes.values())


def _safetensors_shapes(path: Path) -> Shapes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > path.stat().st_size:
            raise _damaged(path, "header longer than the file")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError:
            raise _damaged(path, "no JSON header") from None
    header.pop("__metadata__", None)
    end = max((about["data_offsets"][1] for about in header.values()), default=0)
    expected, size = LENGTH_BYTES + length + end, path.stat().st_size
    if size != expected:
        raise _damaged(path, f"{size} bytes instead of {expected}")
    return {name: tuple(about["shape"]) for name, about in header.items()}


def _bin_shapes(path: Path) -> Shapes:
    """A .bin is opened without its data: tensors come to the meta device. It never runs code."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
        return {name: tuple(tensor.shape) for name, tensor in content.items()}
    except (RuntimeError, ValueError, EOFError, OSError, AttributeError, pickle.UnpicklingError) as error:
        raise _damaged(path, type(error).__name__) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"weight file is damaged ({reason})", where=path, fix="download or copy the file again")

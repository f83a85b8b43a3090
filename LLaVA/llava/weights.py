"""Weights as they lie on disk: which files, reading them without a second copy in memory, and their names."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import UserError
from .files import read_json
from .hub import Source

_READ_ERRORS = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Names of the liuhaotian release -> names of the llava-hf release, which every transformers version can load and save.
_LIUHAOTIAN_TO_HF = (
    (r"^model\.(?=(layers|embed_tokens|norm)\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
)
_TOWER_TO_HF = ((r"^(vision_model\.)?", "vision_tower.vision_model."),)
_CLIP_OTHER_PARTS = re.compile(r"(text_model|text_projection|visual_projection)\.|logit_scale$")
# Buffers that old releases saved; the model computes them.
_OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def is_old_buffer(name: str) -> bool:
    """Whether a tensor of this name is a buffer of old releases that a strict load may leave out."""
    return _OLD_BUFFERS.search(name) is not None


def find_weights(source: Source) -> list[Path]:
    """The weight files of a model: one file, or the shards of its index; safetensors before .bin.

    Raises:
        UserError: there are none, the index is broken, or shards are missing (named).
    """
    for file in WEIGHT_FILES:
        if (path := source.find(file)) is not None:
            return [path]
        if (index := source.find(f"{file}.index.json")) is not None:
            return _shards(source, index)
    raise UserError("no weights", source.name, f"looked for {', '.join(WEIGHT_FILES)} and their index.json")


def _shards(source: Source, index: Path) -> list[Path]:
    fields = read_json(index, "weight index")
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("weight index has no weight_map", index)
    names = sorted(set(weight_map.values()))
    if any(Path(name).name != name for name in names):
        raise UserError("weight index names files outside its folder", index)
    paths = {name: source.find(name) for name in names}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise UserError("weight files missing", source.name, ", ".join(missing))
    return [path for path in paths.values() if path is not None]


def read_tensors(paths: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Tensors of all files by name, mapped from disk where the format allows: memory is used when they are copied.

    Raises:
        UserError: a file is truncated, damaged, or holds something else than tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            tensors |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
        except _READ_ERRORS as error:
            reason = str(error).strip().split("\n")[0][:120]
            raise UserError("weight file is damaged or truncated", path, reason or "empty") from None
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError("not a dict of tensors")
    return tensors


def from_liuhaotian(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives tensors of the liuhaotian release their llava-hf names and drops the buffers of old releases."""
    return {_rename(name, _LIUHAOTIAN_TO_HF): value for name, value in tensors.items() if not is_old_buffer(name)}


def from_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives the vision part of a CLIP checkpoint its llava-hf names; the other parts and old buffers are dropped."""
    return {
        _rename(name, _TOWER_TO_HF): value
        for name, value in tensors.items()
        if not is_old_buffer(name) and _CLIP_OTHER_PARTS.match(name) is None
    }


def has_tower(tensors: Iterable[str]) -> bool:
    """Whether llava-hf names include a vision tower."""
    return any(name.startswith("vision_tower.") for name in tensors)


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        new, count = re.subn(pattern, replacement, name, count=1)
        if count:
            return new
    return name

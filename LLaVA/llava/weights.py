"""Reads weight files: which there are, names and shapes without the data, and the tensors.

Nothing here runs code of a checkpoint, and tensors are mapped from disk where the format allows, so that they take
memory only once. `Source` (see `llava.hub`) is the folder or repository of the model.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import UserError
from .files import check_not_pointer, read_json
from .hub import Source

SPARE, SMALL = 2, 2**24
"""A smaller excess of a config over its checkpoint, as a factor or in weights, is found by name when the tensors are
loaded."""
PACKED = 32
"""Weights that one number of a quantised checkpoint may hold."""
CHECK_SIZES = "check the sizes in config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = {"F16", "BF16", "F32", "F64"} | {str(dtype) for dtype in FLOATS}
"""In headers of safetensors, and torch's."""
WEIGHT_ENDINGS = (".weight", ".bias", "_proj")
"""Endings of names of tensors that are not buffers; the last one is that of experts."""
_READ_ERRORS = (
    SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, OSError, AttributeError,
    TypeError,
)  # fmt: skip

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
    """Whether a tensor of this name is a buffer of old releases, which a strict load leaves out."""
    return _OLD_BUFFERS.search(name) is not None


def weight_map(source: Source) -> dict[str, str] | str:
    """File name of each tensor, from the index of the shards; or the name of the only weight file.

    Safetensors come before .bin, so of a repository that has both only one kind is downloaded.

    Raises:
        UserError: there are no weights, or the index is broken.
    """
    for file in WEIGHT_FILES:
        if source.find(file) is not None:
            return file
        if (path := source.find(f"{file}.index.json")) is not None:
            return read_index(path)
    source.refuse_adapter()
    raise UserError("no weights", source.name, f"looked for {', '.join(WEIGHT_FILES)} and their index.json")


def read_index(path: Path) -> dict[str, str]:
    """File name of each tensor, from ``*.index.json``.

    Raises:
        UserError: the index is broken, or names files outside its folder.
    """
    fields = read_json(path, "weight index")
    files = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError("weight index has no weight_map", path, "download it again")
    if any(Path(name).name != name for name in files.values()):
        raise UserError("weight index names files outside its folder", path)
    return files


def find_weights(source: Source, prefix: str = "") -> list[Path]:
    """All weight files of a model, downloaded if needed: one file, or the shards of its index.

    Args:
        prefix: of names of tensors. If the index has such tensors, only the shards that hold them.

    Raises:
        UserError: as `weight_map`; or shards are missing (named).
    """
    files = weight_map(source)
    if isinstance(files, str):
        return _find_all(source, [files])
    chosen = {file for name, file in files.items() if name.startswith(prefix)} or set(files.values())
    return _find_all(source, sorted(chosen))


def _find_all(source: Source, names: Iterable[str]) -> list[Path]:
    paths = {name: source.find(name) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        raise UserError("weight files missing", source.name, ", ".join(missing))
    return [path for path in paths.values() if path is not None]


def read_tensors(paths: Iterable[Path], names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors by name; of all names, or of those of ``names`` that the files have.

    Raises:
        UserError: a file is truncated, damaged, or holds something other than tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        with _read_errors(path):
            if path.suffix != ".safetensors":
                found = _load_bin(path, "cpu")
                tensors |= {name: value for name, value in found.items() if names is None or name in names}
                continue
            with safe_open(path, framework="pt") as file:
                wanted = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118 (no mapping)
                tensors |= {name: file.get_tensor(name) for name in wanted}
    return tensors


def check_floats(tensors: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Raises `UserError` for a tensor that does not hold floats of 16, 32 or 64 bit, such as one that is quantised."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{name} has values of {kind}", where, "use a checkpoint in 16 or 32 bit")


def quantisation_of(config: Any) -> Any:
    """The quantisation that a config of transformers names, at the top or of its text model. None without."""
    sections = (config, config.get_text_config())
    return next((found for each in sections if (found := getattr(each, "quantization_config", None)) is not None), None)


def check_unquantised(config: Any, paths: Iterable[Path]) -> None:
    """Refuses weights that are not floats although the config names no quantisation: transformers would take their
    numbers as they are. Only headers are read.

    Raises:
        UserError: there is such a weight.
    """
    if quantisation_of(config) is not None:
        return
    for path in paths:
        with _read_errors(path):
            if path.suffix != ".safetensors":
                kinds = {name: str(tensor.dtype) for name, tensor in _load_bin(path, "meta").items()}
            else:
                with safe_open(path, framework="pt") as file:
                    kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        for name, kind in kinds.items():
            if name.endswith(WEIGHT_ENDINGS) and kind not in FLOAT_NAMES:
                what = f"{name} has values of {kind.removeprefix('torch.')}, and the config names no quantisation"
                raise UserError(what, path, "use a checkpoint in 16 or 32 bit, or one with its quantization_config")


def read_first(source: Source, names: Collection[str]) -> torch.Tensor | None:
    """The first tensor of ``names`` that a model has, None if it has none; only the file that holds it is opened.

    Raises:
        UserError: as `read_tensors` and `find_weights`.
    """
    files = weight_map(source)
    if isinstance(files, str):
        tensors = read_tensors(_find_all(source, [files]), names)
        return next((tensors[name] for name in names if name in tensors), None)
    name = next((name for name in names if name in files), None)
    if name is None:
        return None
    (path,) = _find_all(source, [files[name]])
    tensors = read_tensors([path], [name])
    if name not in tensors:
        raise UserError(f"weight file lacks {name}, which the index places there", path, "download it again")
    return tensors[name]


def read_shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name, without their data.

    Raises:
        UserError: as `read_tensors`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with _read_errors(path):
            if path.suffix != ".safetensors":
                shapes |= {name: tuple(tensor.shape) for name, tensor in _load_bin(path, "meta").items()}
                continue
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _load_bin(path: Path, device: str) -> dict[str, torch.Tensor]:
    """A .bin file; files of torch before 1.6 are not zip archives and cannot be mapped."""
    tensors = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError("not a dict of tensors")
    return tensors


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _READ_ERRORS as error:
        check_not_pointer(path)
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError("weight file is damaged or truncated", path, reason or type(error).__name__) from None


def from_liuhaotian(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames tensors of the liuhaotian release to llava-hf names and drops the buffers of old releases."""
    return {_rename(name, _LIUHAOTIAN_TO_HF): value for name, value in tensors.items() if not is_old_buffer(name)}


def from_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the vision part of a CLIP checkpoint to llava-hf names and drops other parts and old buffers."""
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


def check_size(model_class: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Refuses a config that describes a much larger model than the checkpoint holds, before memory is allocated for it.
    A section without its sizes, for example, means those of a 7B model.

    Args:
        model_class: class of transformers.
        shapes: of the checkpoint's tensors.
        name: of the checkpoint, for the message.

    Raises:
        UserError: the model would have more than `SPARE` times the checkpoint's weights, and `SMALL` more. If it is
            quantised, each of its numbers counts as `PACKED` weights.
    """
    held = sum(map(math.prod, shapes.values()))
    found = held if quantisation_of(config) is None else held * PACKED
    sections = (config.get_text_config(), getattr(config, "vision_config", None))
    layers = [getattr(section, key, 0) for section in sections for key in ("num_hidden_layers", "depth")]
    if max(layer for layer in layers if isinstance(layer, int)) > len(shapes):
        raise UserError(f"config has {max(layers)} layers, the checkpoint {len(shapes)} tensors", name, CHECK_SIZES)
    with torch.device("meta"):
        model = model_class(deepcopy(config))
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > max(SPARE * found, found + SMALL):
        sizes = f"{wanted:,} weights, the checkpoint has {held:,}"
        raise UserError(f"config describes a model of {sizes}", name, CHECK_SIZES)

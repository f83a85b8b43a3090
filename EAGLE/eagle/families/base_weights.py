"""Two tensors of a base model, without the model: its token embedding and its ``lm_head``.

Reads only the shards that hold them, from every public layout: one file or shards with an index, ``.bin`` or
safetensors, in the names of liuhaotian, llava-hf, Qwen2-VL and transformers 5.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle.drafts.checkpoint import hub_errors
from llava.errors import UserError
from llava.files import read_json

EMBED_NAMES = (
    "model.embed_tokens.weight",  # liuhaotian, Qwen2-VL
    "model.language_model.embed_tokens.weight",  # transformers 5
    "language_model.model.embed_tokens.weight",  # llava-hf
    "model.language_model.model.embed_tokens.weight",  # LLaVA-1.6 written by transformers 5.4
)
HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight")
CONFIG = "config.json"
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")

Finder = Callable[[str], Path | None]


class BaseTensors(NamedTuple):
    """``embed`` [V, H] the token embedding; ``head`` [V, H] the weight of ``lm_head``; in the base's dtype."""

    embed: Tensor
    head: Tensor


def load_base_tensors(path: str | Path, **hub: Any) -> BaseTensors:
    """Reads embedding and head of a base model.

    Args:
        path: folder or hub name; from the hub only the files needed are fetched.
        hub: ``revision``, ``cache_dir``, ``local_files_only``, ``token``.

    Raises:
        UserError: nothing is there, a file is broken, or no tensor has a known name.
    """
    find = _finder(path, **hub)
    config = read_json(find(CONFIG) or Path(path) / CONFIG, "base model config")
    files = _weight_map(find, path)
    embed = _read(files, EMBED_NAMES, find, path)
    if embed is None:
        raise UserError("no token embedding", where=path, fix=f"expected one of {', '.join(EMBED_NAMES)}")
    head = _read(files, HEAD_NAMES, find, path)
    if head is None:
        tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False))
        if not tied:
            raise UserError("no lm_head", where=path, fix=f"expected {' or '.join(HEAD_NAMES)}, or tie_word_embeddings")
        head = embed
    if embed.shape != head.shape:
        raise UserError(f"embedding {list(embed.shape)} and lm_head {list(head.shape)} differ in shape", where=path)
    return BaseTensors(embed, head)


def _finder(path: str | Path, **hub: Any) -> Finder:
    """Gives the local path of a file of the base, None where the base has no such file."""
    if Path(path).is_dir():
        return lambda name: Path(path) / name if (Path(path) / name).is_file() else None

    def fetch(name: str) -> Path | None:
        with hub_errors("base model", path):
            try:
                return Path(hf_hub_download(str(path), name, **hub))
            except RemoteEntryNotFoundError:
                return None
            except LocalEntryNotFoundError:  # without network; of all files only this one is in every repository
                if name == CONFIG:
                    raise
                return None

    return fetch


def _weight_map(find: Finder, path: str | Path) -> dict[str, str] | str:
    """Tensor name → file name, or the name of the only file."""
    for name in INDEX_FILES:
        index = find(name)
        if index is not None:
            content = read_json(index, "index of the weights")
            if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
                raise UserError("has no weight_map", where=index, fix="download the file again")
            return content["weight_map"]
    for name in SINGLE_FILES:
        if find(name) is not None:
            return name
    raise UserError("no weights", where=path, fix=f"expected {' or '.join(SINGLE_FILES)}, or shards with an index")


def _read(files: Mapping[str, str] | str, names: tuple[str, ...], find: Finder, path: str | Path) -> Tensor | None:
    """The first tensor of ``names`` that the checkpoint has."""
    if isinstance(files, str):
        return _read_from(_found(find, files, path), names)
    for name in names:
        if name in files:
            file = _found(find, files[name], path)
            tensor = _read_from(file, (name,))
            if tensor is None:
                raise UserError(f"lacks {name}, which the index puts there", where=file, fix="download the file again")
            return tensor
    return None


def _found(find: Finder, name: str, path: str | Path) -> Path:
    file = find(name)
    if file is None:
        raise UserError(f"{name} is missing", where=path, fix="the index names it; download it again")
    return file


def _read_from(file: Path, names: tuple[str, ...]) -> Tensor | None:
    """The first tensor of ``names`` in one file. ``.bin`` is mapped and never runs code."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                name = next((name for name in names if name in tensors.keys()), None)  # noqa: SIM118
                return None if name is None else tensors.get_tensor(name)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # the format before torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)
        name = next((name for name in names if name in content), None)
        return None if name is None else content[name].clone()
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(
            f"cannot be read ({type(error).__name__})", where=file, fix="download or copy the file again"
        ) from error

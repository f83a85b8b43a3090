"""Draft checkpoints: read the published layout strictly, write it atomically, never unpickle code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle.model.config import DraftConfig
from eagle.model.draft import DraftModel
from llava.errors import UserError
from llava.files import atomic_write, read_json

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD_TOKENS = "head_tokens.safetensors"
HUB_KEYS = ("revision", "cache_dir", "local_files_only", "token")


@contextmanager
def hub_errors(what: str, name: str | Path) -> Iterator[None]:
    """Turns "not a folder, and the hub did not give it" into one clear line."""
    if Path(name).exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise UserError(f"{what} not found", where=name, fix="give a folder, or a hub name such as owner/model")
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{what} is no folder here, and the hub did not give it", where=name, fix=reason) from error


def resolve_folder(name: str | Path, what: str, patterns: list[str], **hub: Any) -> Path:
    """The local folder of a checkpoint: ``name`` itself, or a download of the hub repository of that name."""
    if Path(name).is_dir():
        return Path(name)
    with hub_errors(what, name):
        return Path(snapshot_download(str(name), allow_patterns=patterns, **hub))


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a one-file checkpoint, and the file. safetensors first, then a .bin without code."""
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            if name.endswith(".safetensors"):
                return load_file(path), path
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)), path
        except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"cannot be read ({type(error).__name__})", where=path, fix="download or copy the file again"
            ) from error
    raise UserError("no draft weights", where=folder, fix=f"expected {' or '.join(WEIGHT_FILES)}")


def load_draft(
    name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu", **hub: Any
) -> DraftModel:
    """Loads a draft from a folder or the hub.

    Args:
        dtype: a torch dtype, or "auto" for the checkpoint's own.
        hub: ``revision``, ``cache_dir``, ``local_files_only``, ``token``.

    Raises:
        UserError: a file is missing or broken, or a tensor is missing, unexpected or of another shape.
    """
    folder = resolve_folder(name, "draft", ["config.json", HEAD_TOKENS, *WEIGHT_FILES], **hub)
    tensors, path = read_tensors(folder)
    config = DraftConfig.from_json(folder, tensors=tensors)
    with torch.device("meta"):
        draft = DraftModel(config)
    _check_tensors(tensors, draft.state_dict(), path)
    draft.load_state_dict(tensors, assign=True)
    draft.rotary = type(draft.rotary)(config.head_dim, config.rope_theta, config.mrope_section)
    if config.options.head_tokens is not None:
        draft.head_tokens = read_head_tokens(folder, config)
    own = tensors["fc.weight"].dtype
    return draft.to(device=device, dtype=dtype if isinstance(dtype, torch.dtype) else own).eval().requires_grad_(False)


def read_head_tokens(folder: Path, config: DraftConfig) -> Tensor:
    """The trimmed vocabulary [K] of a draft.

    Raises:
        UserError: the file is missing or broken, or an id is outside the vocabulary.
    """
    path = folder / Path(config.options.head_tokens or HEAD_TOKENS).name
    fix = "make it again: python -m eagle.ge_data.vocabulary"
    try:
        tokens = load_file(path)["tokens"]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"trimmed vocabulary cannot be read ({type(error).__name__})", path, fix) from None
    usable = tokens.ndim == 1 and tokens.numel() > 0 and tokens.dtype in (torch.int32, torch.int64)
    if not usable or int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise UserError(f"trimmed vocabulary does not fit a vocabulary of {config.vocab_size}", path, fix)
    return tokens.long()


def write_head_tokens(folder: Path, tokens: Tensor) -> None:
    """Gives the draft in ``folder`` a trimmed vocabulary: ids [K], in any order."""
    with atomic_write(folder / HEAD_TOKENS) as temporary:
        save_file({"tokens": tokens.unique().to("cpu", torch.int32)}, temporary)
    config = read_json(folder / "config.json", "draft config")
    config["msd"] = {**config.get("msd", {}), "head_tokens": HEAD_TOKENS}
    with atomic_write(folder / "config.json") as temporary:
        Path(temporary).write_text(json.dumps(config, indent=2) + "\n")


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Raises one error that lists every tensor which is missing, unexpected or of another shape."""
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {list(tensor.shape)}, config.json says {list(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if problems:
        raise UserError(
            "draft does not fit its config: " + "; ".join(problems), where=path, fix="is this an MSD draft?"
        )


def save_draft(draft: DraftModel, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes ``config.json`` and ``model.safetensors`` in the published layout, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in draft.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config = {**draft.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
    with atomic_write(folder / "config.json") as temporary:
        Path(temporary).write_text(json.dumps(config, indent=2) + "\n")
    return folder

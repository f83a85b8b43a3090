"""Draft checkpoints: read the published layout strictly, write it atomically, never unpickle code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle.drafts.config import HEAD_TOKENS, DraftConfig
from eagle.drafts.draft_vocab import read_head_tokens, write_head_tokens
from eagle.drafts.msd import DraftModel
from llava.errors import UserError
from llava.files import atomic_write

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_KEYS = ("revision", "cache_dir", "local_files_only", "token")


@contextmanager
def hub_errors(what: str, name: str | Path) -> Iterator[None]:
    """Turns "not a folder, and the hub did not give it" into one clear line."""
    if Path(name).exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise UserError(f"{what} not found", where=name, fix="give a folder, or a hub name such as owner/model")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the HTTP library's own, such as a proxy's refusal, have no class in common
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{what} is no folder here, and the hub did not give it", where=name, fix=reason) from error


def resolve_folder(name: str | Path, what: str, patterns: list[str], **hub: Any) -> Path:
    """The local folder of a checkpoint: ``name`` itself, or a download of the hub repository of that name."""
    if Path(name).is_dir():
        return Path(name)
    with hub_errors(what, name):
        return Path(snapshot_download(str(name), allow_patterns=patterns, **hub))


def weights_file(folder: Path) -> Path:
    """The one file of a draft's tensors, safetensors first.

    Raises:
        UserError: there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError("no draft weights", where=folder, fix=f"expected {' or '.join(WEIGHT_FILES)}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a one-file checkpoint; a .bin never runs code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(
            f"cannot be read ({type(error).__name__})", where=path, fix="download or copy the file again"
        ) from error


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
    path = weights_file(folder)
    tensors = read_tensors(path)
    try:
        config = DraftConfig.from_json(folder, tensors=tensors)
        with torch.device("meta"):
            draft = DraftModel(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise UserError("draft config is not valid", where=folder / "config.json", fix=reason) from error
    if problems := misfits({name: tuple(tensor.shape) for name, tensor in tensors.items()}, draft):
        raise UserError(
            "draft does not fit its config: " + "; ".join(problems), where=path, fix="is this an MSD draft?"
        )
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"draft has values that are not numbers in {', '.join(broken)}", path, "take another checkpoint"
        )
    draft.load_state_dict(tensors, assign=True)
    draft.rotary = type(draft.rotary)(config.head_dim, config.rope_theta, config.mrope_section)
    if config.options.head_tokens is not None:
        draft.head_tokens = read_head_tokens(folder, config)
    own = tensors["fc.weight"].dtype
    return draft.to(device=device, dtype=dtype if isinstance(dtype, torch.dtype) else own).eval().requires_grad_(False)


def misfits(shapes: Mapping[str, tuple[int, ...]], draft: DraftModel) -> list[str]:
    """Every tensor of a checkpoint that ``draft`` misses, does not know, or has in another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    problems = [f"missing {name}" for name in wanted if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in wanted]
    return problems + [
        f"{name} is {list(shape)}, config.json says {list(wanted[name])}"
        for name, shape in shapes.items()
        if name in wanted and shape != wanted[name]
    ]


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
    if draft.head_tokens is not None:
        write_head_tokens(folder, draft.head_tokens)
    return folder

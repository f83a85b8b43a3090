"""Draft checkpoints: read the published layout strictly, write it atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eagle.drafts.config import HEAD_TOKENS, DraftConfig
from eagle.drafts.draft_vocab import read_head_tokens, write_head_tokens
from eagle.drafts.msd import DraftModel
from llava.errors import UserError
from llava.files import atomic_write
from llava.hub import Source
from llava.weights import find_weights, read_tensors


def load_draft(
    name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu", **hub: Any
) -> DraftModel:
    """Loads a draft from a folder or the hub.

    Args:
        name: folder or hub name.
        dtype: a torch dtype, or "auto" for the checkpoint's own.
        hub: see `llava.hub.HUB_KEYS`.

    Raises:
        UserError: a file is missing or broken, or a tensor is missing, unexpected or of another shape.
    """
    source = Source.of(name, hub, "draft")
    config_file = source.require("config.json", "draft config")
    paths = find_weights(source)
    tensors = read_tensors(paths)
    try:
        config = DraftConfig.from_json(config_file, tensors=tensors)
        with torch.device("meta"):
            draft = DraftModel(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise UserError("draft config is not valid", where=config_file, fix=reason) from error
    if problems := misfits({name: tuple(tensor.shape) for name, tensor in tensors.items()}, draft):
        raise UserError(f"draft does not fit its config: {'; '.join(problems)}", paths[0], "is this an MSD draft?")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"draft has NaN or infinite values in {', '.join(broken)}", paths[0], "use another checkpoint")
    draft.load_state_dict(tensors, assign=True)
    draft.rotary = type(draft.rotary)(config.head_dim, config.rope_theta, config.mrope_section)
    if config.options.head_tokens is not None:
        source.find(HEAD_TOKENS)  # downloads it beside the config
        draft.head_tokens = read_head_tokens(config_file.parent, config)
    own = tensors["fc.weight"].dtype
    return draft.to(device=device, dtype=dtype if isinstance(dtype, torch.dtype) else own).eval().requires_grad_(False)


def misfits(shapes: Mapping[str, tuple[int, ...]], draft: DraftModel) -> list[str]:
    """Names the tensors of a checkpoint that are missing, unexpected, or of another shape than in ``draft``."""
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

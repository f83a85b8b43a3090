"""Draft checkpoints: read the published layout strictly, write it atomically."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eagle.drafts.config import DRAFT_VOCAB_FILE, DraftConfig
from eagle.drafts.draft_vocab import read_draft_vocab, write_draft_vocab
from eagle.drafts.msd import DraftModel
from llava.errors import UserError
from llava.files import atomic_write, write_json
from llava.hub import Source
from llava.loading import load_errors
from llava.weights import find_weights, is_old_buffer, read_tensors

HEAD = "lm_head.weight"
log = logging.getLogger(__name__)


def load_draft(
    name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu", **hub: Any
) -> DraftModel:
    """Loads a draft from a folder or the hub.

    Args:
        name: folder or hub name.
        dtype: a torch dtype, or "auto" for the checkpoint's own.
        device: "meta" opens the weight files and does not read their data.
        hub: see `llava.hub.HUB_KEYS`.

    Raises:
        UserError: a file is missing or broken, or a tensor is missing, unexpected or of another shape.
    """
    source = Source.of(name, hub, "draft")
    config_file = source.require("config.json", "draft config")
    paths = find_weights(source)
    tensors = read_tensors(paths)
    spare = {name: tensors.pop(name) for name in list(tensors) if is_spare(name)}
    with load_errors("draft config is not valid", config_file):
        config = DraftConfig.from_json(config_file, tensors=tensors)
        with torch.device("meta"):
            draft = DraftModel(config)
    if problems := misfits({name: tuple(tensor.shape) for name, tensor in tensors.items()}, draft):
        raise UserError(f"draft does not fit its config: {'; '.join(problems)}", paths[0], "is this an MSD draft?")
    meta = torch.device(device).type == "meta"
    if not meta and (broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]):
        raise UserError(f"draft has NaN or infinite values in {', '.join(broken)}", paths[0], "use another checkpoint")
    draft.load_state_dict(tensors, assign=True)
    if spare:
        log.warning("%s: a draft does not need %s, left out", name, ", ".join(spare))
        draft.spare_head = spare.get(HEAD)
    draft.rotary = type(draft.rotary)(
        config.head_dim, config.rope_theta, config.mrope_section, config.mrope_interleaved
    )
    if config.options.head_tokens is not None:
        source.find(DRAFT_VOCAB_FILE)  # downloads it beside the config
        draft.draft_vocab = read_draft_vocab(config_file.parent, config)
    own = tensors["fc.weight"].dtype
    return draft.to(device=device, dtype=dtype if isinstance(dtype, torch.dtype) else own).eval().requires_grad_(False)


def is_spare(name: str) -> bool:
    """Whether a draft may have a tensor of this name though it does not use it: a buffer of old releases, or the base
    model's ``lm_head``."""
    return name == HEAD or is_old_buffer(name)


def misfits(shapes: Mapping[str, tuple[int, ...]], draft: DraftModel) -> list[str]:
    """Names the tensors of a checkpoint that are missing, unexpected, or of another shape than in ``draft``."""
    wanted = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    problems = [f"missing {name}" for name in wanted if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in wanted and not is_spare(name)]
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
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**draft.config.to_dict(), "torch_dtype": dtype_name})
    if draft.draft_vocab is not None:
        write_draft_vocab(folder, draft.draft_vocab)
    return folder

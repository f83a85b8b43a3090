"""The trimmed vocabulary of a draft: a file beside its weights, named in its config."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle.drafts.config import HEAD_TOKENS, DraftConfig
from llava.errors import UserError
from llava.files import atomic_write, read_json


def read_head_tokens(folder: Path, config: DraftConfig) -> Tensor:
    """The trimmed vocabulary [K] of a draft.

    Raises:
        UserError: the file is missing or broken, or an id is outside the vocabulary.
    """
    path = folder / HEAD_TOKENS
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

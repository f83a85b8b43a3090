"""The trimmed vocabulary of a draft: a file beside its weights that its config names (key ``head_tokens``)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle.drafts.config import DRAFT_VOCAB_FILE, DraftConfig
from llava.errors import UserError
from llava.files import atomic_write, read_json, write_json
from llava.weights import read_tensors


def read_draft_vocab(folder: Path, config: DraftConfig) -> Tensor:
    """Token ids [K] of the draft's trimmed vocabulary.

    Raises:
        UserError: the file is missing or broken, or an id is outside the vocabulary.
    """
    path = folder / DRAFT_VOCAB_FILE
    fix = "make it again: python -m eagle.ge_data.vocabulary"
    try:
        tokens = read_tensors([path])["tokens"]
    except (UserError, OSError, KeyError):
        raise UserError("trimmed vocabulary cannot be read", path, fix) from None
    usable = tokens.ndim == 1 and tokens.numel() > 0 and tokens.dtype in (torch.int32, torch.int64)
    if not usable or int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise UserError(f"trimmed vocabulary does not fit a vocabulary of {config.vocab_size}", path, fix)
    return tokens.long()


def write_draft_vocab(folder: Path, tokens: Tensor) -> None:
    """Writes a trimmed vocabulary for the draft in ``folder`` and names it in its config.

    Args:
        tokens: [K] token ids, in any order.
    """
    with atomic_write(folder / DRAFT_VOCAB_FILE) as temporary:
        save_file({"tokens": tokens.unique().to("cpu", torch.int32)}, temporary)
    config = read_json(folder / "config.json", "draft config")
    config["msd"] = {**config.get("msd", {}), "head_tokens": DRAFT_VOCAB_FILE}
    write_json(folder / "config.json", config)

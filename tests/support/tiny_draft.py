"""Tiny random drafts in the published layout, for any base. No pytest in here."""

from __future__ import annotations

from pathlib import Path

import torch

from eagle.drafts.block import BlockDraft
from eagle.drafts.checkpoint import save_draft
from eagle.drafts.config import BLOCK, BlockConfig, DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import Target


def make_draft(folder: str | Path, target: Target, seed: int = 0, agree: float = 0.6, **changes) -> Path:
    """Writes a draft that fits ``target`` and returns its folder.

    Args:
        agree: how much of the target's hidden state ``fc`` passes on, 0 to 1; with 1 and the target's own token
            embedding the draft agrees now and then though nobody trained it.
        changes: fields of the draft's ``config.json`` to set otherwise; with ``block`` it is a block head.
    """
    torch.manual_seed(seed)
    text = target.config.get_text_config()
    config = {
        "model_type": target.family,
        "hidden_size": text.hidden_size,
        "intermediate_size": 2 * text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": target.cache_shapes[0][0],
        "vocab_size": target.model.get_input_embeddings().num_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        **changes,
    }
    draft: DraftModel
    if BLOCK in config:
        draft = BlockDraft(BlockConfig.from_dict(config))
        torch.nn.init.normal_(draft.mask_rows, std=0.5)
    else:
        draft = DraftModel(DraftConfig.from_dict(config))
    if config["hidden_size"] == text.hidden_size:
        size = text.hidden_size
        with torch.no_grad():
            draft.embed_tokens.weight.copy_(target.model.get_input_embeddings().weight)
            draft.fc.weight[:, size:] += agree * torch.eye(size)
    return save_draft(draft, folder, dtype=torch.float32)

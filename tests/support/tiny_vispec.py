"""Tiny random ViSpec heads in their published layout, for any target. No pytest in here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eagle.drafts.vispec import ViSpecDraft
from eagle.families import Target


def make_vispec(
    folder: str | Path, target: Target, queries: int = 3, drop: tuple[str, ...] = (), **changes: Any
) -> Path:
    """Writes a head that fits ``target``, of a hidden size of 32, and returns its folder.

    Args:
        queries: learnt ones; all results but one are rows of the layer.
        drop: tensors to leave out.
        changes: fields of ``config.json``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = target.model.get_input_embeddings().weight.detach()
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": len(table), **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    biases = ("layers.0.self_attn.q_proj.bias", "imadpt.k_proj.bias", "fc.bias")
    shapes = {"imadpt.q": (queries, 4, 8), **dict.fromkeys(biases, (32,))}
    head = ViSpecDraft.from_dict({**config, "msd": {}}, "config.json", shapes)
    tensors = {name: torch.randn(tensor.shape) / 6 for name, tensor in head.state_dict().items() if name not in drop}
    tensors["embed_tokens.weight"] = table.clone()
    tensors["fc.weight"][:, 32:] += torch.eye(32)
    tensors["img_fc.weight"][:, :32] += torch.eye(32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder

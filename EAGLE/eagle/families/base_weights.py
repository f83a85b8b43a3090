"""Two tensors of a base model, without the model: its token embedding and its ``lm_head``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import CONFIG_MAPPING

from eagle.families.registry import target_class_of
from llava.errors import UserError
from llava.files import read_object
from llava.hub import Source
from llava.weights import check_floats, read_first

EMBED_NAMES = (
    "model.embed_tokens.weight",  # liuhaotian, Qwen2-VL
    "model.language_model.embed_tokens.weight",  # transformers 5
    "language_model.model.embed_tokens.weight",  # llava-hf
    "model.language_model.model.embed_tokens.weight",  # LLaVA-1.6 written by transformers 5.4
)
HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight")


class BaseTensors(NamedTuple):
    """``embed`` [V, H] the token embedding; ``head`` [V, H] the weight of ``lm_head``; in the base's dtype. ``cap``:
    the base's logits l are ``cap * tanh(l / cap)``."""

    embed: Tensor
    head: Tensor
    cap: float | None = None


def load_base_tensors(path: str | Path, **hub: Any) -> BaseTensors:
    """Reads embedding and head of a base model.

    Args:
        path: folder or hub name; only the files needed are opened and downloaded.
        hub: see `llava.hub.HUB_KEYS`.

    Raises:
        UserError: nothing is there, a file is broken, or no tensor has a known name.
    """
    source = Source.of(path, hub, "base model")
    config = read_object(source.require("config.json", "base model config"), "base model config")
    embed, head = read_first(source, EMBED_NAMES), read_first(source, HEAD_NAMES)
    if embed is None:
        raise UserError("no token embedding", where=path, fix=f"expected one of {', '.join(EMBED_NAMES)}")
    if head is None:
        if not is_tied(config):
            raise UserError("no lm_head", where=path, fix=f"expected {' or '.join(HEAD_NAMES)}, or tie_word_embeddings")
        head = embed
    check_floats({"the token embedding": embed, "lm_head": head}, path)
    if embed.shape != head.shape:
        raise UserError(f"embedding {list(embed.shape)} and lm_head {list(head.shape)} differ in shape", where=path)
    cap = (config.get("text_config") or {}).get("final_logit_softcapping")
    caps = cap is not None and target_class_of(path, **hub).caps_logits
    return BaseTensors(embed, head, cap if caps else None)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a base's ``lm_head`` is its embedding: what its config says, else the default of its config class."""
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    kind = config.get("model_type")
    return kind in CONFIG_MAPPING and bool(CONFIG_MAPPING[kind]().tie_word_embeddings)

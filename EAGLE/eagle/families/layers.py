"""Which text models, and which of their layers, the engine verifies exactly. Everything else is refused at load."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from llava.errors import UserError

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
WITH_WINDOWS = (
    "afmoe", "beam", "cohere2", "cohere2_moe", "cwm", "doge", "dots1", "exaone4", "exaone_moe", "flint", "gemma2",
    "gemma3_text", "gpt_oss", "granite_swa", "granitemoe_swa", "kolibri1", "laguna", "mellum", "ministral",
    "ministral3", "mistral", "mixtral", "moshi", "muse_glimmer_text", "muse_spark_text", "olmo3", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2", "vaultgemma",
)  # fmt: skip
"""Text models that any family may be built around, with sliding windows or without."""
FULL_ONLY = (
    "apertus", "apertus1p5_text", "arcee", "aria_text", "biogpt", "bitnet", "cohere", "diffllama", "ernie4_5",
    "ernie4_5_moe", "exaone", "flex_olmo", "gemma", "glm", "glm4", "glm4_moe", "gpt_neox", "granite",
    "granite_docling_text", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "llama", "minimax_m2", "minimax_m3_vl_text",
    "molmo2_text", "nanochat", "nemotron", "olmo", "olmo2", "olmoe", "persimmon", "phi", "sarvam_moe", "seed_oss",
    "solar_open", "stablelm", "xglm",
)  # fmt: skip
"""The same without sliding windows. A test compares every name of both lists with transformers' `generate`."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "mrope", "proportional")
"""Kinds of rotary positions whose angles depend on the position alone."""
TREE_FIX = "decode it with transformers' own generate"


class AttentionLayers(NamedTuple):
    """``window``: rows that a sliding layer sees, itself included; None without such layers. ``by_type``: the text
    model takes a mapping from layer type to mask. ``linear``: the layers that have a state instead of cached rows."""

    window: int | None
    by_type: bool
    linear: tuple[int, ...] = ()


def check_text_type(kind: str, own: Collection[str] = ()) -> None:
    """Raises `UserError` if it is not known that the layers of this text model verify a draft tree exactly."""
    if kind not in (*own, *WITH_WINDOWS, *FULL_ONLY):
        raise UserError(f"language model '{kind}' is not known to verify a draft tree exactly", fix=TREE_FIX)


def attention_layers(config: Any, own: Collection[str] = ()) -> AttentionLayers:
    """The layers of a text model, from its config.

    Args:
        own: text models that only the family at hand can run.

    Raises:
        UserError: its layers or rotary positions are not known to verify a draft tree exactly.
    """
    check_text_type(config.model_type, own)
    check_rope(config)
    layers = tuple(getattr(config, "layer_types", None) or ())
    types = set(layers)
    unknown = sorted(types - {FULL, LINEAR if config.model_type in own else SLIDING, SLIDING})
    if unknown:
        raise UserError(f"layers of type {', '.join(unknown)} cannot verify a draft tree exactly", fix=TREE_FIX)
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise UserError("attention to later tokens cannot verify a draft tree exactly", fix=TREE_FIX)
    if LINEAR in types:
        return AttentionLayers(None, True, tuple(index for index, kind in enumerate(layers) if kind == LINEAR))
    window = getattr(config, "sliding_window", None)
    if SLIDING not in types if types else getattr(config, "use_sliding_window", True) is False:
        window = None
    if window is not None and config.model_type in FULL_ONLY:
        raise UserError(f"sliding windows of '{config.model_type}' cannot verify a draft tree exactly", fix=TREE_FIX)
    return AttentionLayers(window, bool(types) and window is not None)


def rope_parts(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings of a text model: one mapping, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [part for part in rope.values() if isinstance(part, Mapping)] or [rope]


def position_limit(config: Any) -> int | None:
    """Positions that a text model is made for: ``max_position_embeddings``, or more if its rotary positions are scaled.
    None if the config does not say.

    >>> from types import SimpleNamespace
    >>> position_limit(SimpleNamespace(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 2.0}))
    8192
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    scaled = [
        int(part["factor"] * (part.get("original_max_position_embeddings") or limit))
        for part in rope_parts(config)
        if part.get("factor")
    ]
    return max([limit, *scaled])


def check_rope(config: Any) -> None:
    """Raises `UserError` if the angles of a position depend on the length of the sequence.

    `generate` computes each key with the length at its time, and a tree is verified in one forward.
    """
    for part in rope_parts(config):
        kind = part.get("rope_type", part.get("type", "default"))
        if kind not in STATIC_ROPE:
            raise UserError(
                f"rotary positions of type '{kind}' depend on the length, so a draft tree is not verified exactly",
                fix=f"set rope_type to one of {', '.join(STATIC_ROPE)}, or {TREE_FIX}",
            )

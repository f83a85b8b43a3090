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
ALL_ALIKE = (
    "doge", "ministral3", "mistral", "mixtral", "moshi", "phi3", "phimoe", "qwen3_moe", "starcoder2",
)  # fmt: skip
"""Those of `WITH_WINDOWS` whose layers are all sliding or all full: the model does not read ``layer_types``."""
GEMMA4 = ("gemma4_text", "gemma4_unified_text")
OWN_WINDOWS = (*GEMMA4, "qwen2_vl_text", "qwen2_5_vl_text")
"""Text models of one family with sliding windows."""
OWN_STATES = ("qwen3_5_text", "qwen3_5_moe_text")
"""Text models of one family with linear attention."""
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
    kind = config.model_type
    check_text_type(kind, own)
    if getattr(config, "is_heterogeneous", False) and kind not in GEMMA4:
        raise UserError(f"layers of different sizes (per_layer_config) are not supported in '{kind}'", fix=TREE_FIX)
    check_rope(config)
    layers, window = tuple(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    types = set(layers)
    unknown = sorted(types - known_types(kind, window))
    if unknown:
        what = f"layers of type {', '.join(unknown)} in '{kind}' with sliding_window {window}"
        raise UserError(f"{what} cannot verify a draft tree exactly", fix=TREE_FIX)
    seen_later = (None, False, "vision") if kind in GEMMA4 else (None, False)
    is_causal = getattr(config, "is_causal", True)
    if getattr(config, "use_bidirectional_attention", None) not in seen_later or not is_causal:
        raise UserError("attention to later tokens cannot verify a draft tree exactly", fix=TREE_FIX)
    if not types and getattr(config, "attention_chunk_size", None) is not None:
        raise UserError(f"attention in chunks of '{kind}' cannot verify a draft tree exactly", fix=TREE_FIX)
    if LINEAR in types:
        return AttentionLayers(None, True, tuple(index for index, layer in enumerate(layers) if layer == LINEAR))
    if types and SLIDING not in types:
        window = None
    if window == 1:  # transformers' cache keeps all rows then
        raise UserError("sliding_window 1 cannot verify a draft tree exactly", fix="take a window of at least 2")
    if window is not None and SLIDING not in known_types(kind, window):
        raise UserError(f"sliding windows of '{kind}' cannot verify a draft tree exactly", fix=TREE_FIX)
    return AttentionLayers(window, bool(types) and window is not None and kind not in ALL_ALIKE)


def known_types(kind: str, window: int | None) -> set[str]:
    """The types of layers of a text model that are verified as transformers runs them. ``window``: its
    ``sliding_window``, without which no layer can be a sliding one."""
    if kind in OWN_STATES:
        return {FULL, LINEAR}
    if not window or kind not in (*WITH_WINDOWS, *OWN_WINDOWS):
        return {FULL}
    return {SLIDING} if kind in ALL_ALIKE else {FULL, SLIDING}


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

"""Which kinds of layers of a text model the engine verifies exactly. Everything else is refused at load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llava.errors import UserError

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
ONE_WINDOW = ("mistral", "phi3")
"""Text models that use one window in all layers and take one mask."""
MASK_BY_LAYER_TYPE = (
    "cohere2", "gemma2", "gemma3_text", "gemma4_text", "ministral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "smollm3",
)  # fmt: skip
"""Text models that take a mask for each type of layer, as a mapping."""
LINEAR_STATES = ("qwen3_5_text", "qwen3_5_moe_text")
"""Text models with linear-attention layers whose states the engine keeps."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "mrope", "proportional")
"""Kinds of rotary positions whose angles depend on the position alone."""
TREE_FIX = "decode it with transformers' own generate"


class AttentionLayers(NamedTuple):
    """``window``: rows that a sliding layer sees, itself included; None without such layers. ``by_type``: the text
    model takes a mapping from layer type to mask. ``linear``: the layers that have a state instead of cached rows."""

    window: int | None
    by_type: bool
    linear: tuple[int, ...] = ()


def attention_layers(config: Any) -> AttentionLayers:
    """The layers of a text model, from its config.

    Raises:
        UserError: it has layers or rotary positions that a draft tree cannot be verified with exactly.
    """
    check_rope(config)
    layers = tuple(getattr(config, "layer_types", None) or ())
    types = set(layers)
    if LINEAR in types and types <= {LINEAR, FULL} and getattr(config, "model_type", None) in LINEAR_STATES:
        return AttentionLayers(None, True, tuple(index for index, kind in enumerate(layers) if kind == LINEAR))
    unknown = sorted(types - {FULL, SLIDING})
    if unknown:
        raise UserError(f"layers of type {', '.join(unknown)} cannot verify a draft tree exactly", fix=TREE_FIX)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or (types and SLIDING not in types):
        window = None
    if window is None:
        return AttentionLayers(None, False)
    if config.model_type in ONE_WINDOW and not types:
        return AttentionLayers(window, False)
    if config.model_type in MASK_BY_LAYER_TYPE and types:
        return AttentionLayers(window, True)
    raise UserError(
        f"sliding window attention of '{config.model_type}' cannot verify a draft tree exactly", fix=TREE_FIX
    )


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

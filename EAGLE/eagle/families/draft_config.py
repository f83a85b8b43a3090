"""The config of a new draft for a base model: one layer with the sizes of its text model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from eagle.drafts.config import VISPEC, DraftConfig, ViSpecConfig
from eagle.drafts.eagle3_config import Eagle3Config, default_layers
from eagle.families.layers import FULL
from eagle.families.registry import family_of
from llava.hub import Source
from llava.layout import MODEL_TYPES, build_config, open_checkpoint
from llava.loading import load_errors


def draft_config_of(base: str | Path, **hub: Any) -> DraftConfig:
    """Reads the base's config.json alone.

    Args:
        base: folder or hub name.
        hub: see `llava.hub.HUB_KEYS`.

    Raises:
        UserError: there is none, or its family is not supported.
    """
    family, text = text_config_of(base, **hub)
    return DraftConfig.from_dict(draft_fields(family, text), where=f"draft for {base}")


def eagle3_config_of(base: str | Path, **hub: Any) -> Eagle3Config:
    """The config of an EAGLE-3 head that vLLM and SGLang know, with all of the base's vocabulary; see
    `draft_config_of`."""
    family, text = text_config_of(base, **hub)
    fields = {**draft_fields(family, text), "model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
    fields |= {"draft_vocab_size": text.vocab_size, "target_hidden_size": text.hidden_size}
    fields |= {"norm_before_residual": False, "max_position_embeddings": text.max_position_embeddings}
    layers = few_layers(text.num_hidden_layers)
    if layers is not None:
        fields["eagle_aux_hidden_state_layer_ids"] = layers
    return Eagle3Config.from_dict(fields, where=f"draft for {base}")


def vispec_config_of(base: str | Path, **hub: Any) -> ViSpecConfig:
    """The config of a ViSpec head in the published layout: each head has its own keys and values, and a bias if the
    base's have one; see `draft_config_of`."""
    family, text = text_config_of(base, **hub)
    fields = {**draft_fields(family, text), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    fields |= {"num_key_value_heads": text.num_attention_heads, "qkv_bias": "qwen2" in text.model_type, VISPEC: {}}
    layout = {key: value for key, value in fields.items() if key not in ("head_dim", "rope_scaling")}
    return ViSpecConfig.from_dict(layout, where=f"draft for {base}")


def eagle3_layers(count: int) -> tuple[int, ...]:
    """The layers whose inputs a new EAGLE-3 head of a base with so many layers reads."""
    return tuple(few_layers(count) or default_layers(count))


def few_layers(count: int) -> list[int] | None:
    """The layers whose inputs an EAGLE-3 head reads where the default ones are not three different ones.

    >>> [few_layers(count) for count in (2, 3, 4, 6, 7)]
    [[0, 1, 2], [1, 2, 3], [1, 2, 3], [1, 3, 5], None]
    """
    if count >= 7:
        return None
    return [1, count // 2, count - 1] if count > 3 else [count - 2, count - 1, count]


def text_config_of(base: str | Path, **hub: Any) -> tuple[str, Any]:
    """Name of the base's family, and the config of its text model; arguments and errors as of `draft_config_of`."""
    family = family_of(base, **hub)
    with load_errors("base model config is not valid", base):
        if set(family.model_types) & set(MODEL_TYPES):
            config = build_config(open_checkpoint(Source.of(base, hub, "base model")))
        else:
            config = AutoConfig.from_pretrained(str(base), **hub)
        return family.name, config.get_text_config()


def draft_fields(family: str, text: Any) -> dict[str, Any]:
    """A draft's ``config.json`` for a text model's config."""
    heads = text.num_attention_heads
    layers = getattr(text, "per_layer_config", None)  # of models whose layers differ
    layer = layers[0] if layers else text
    head_dim = getattr(layer, "head_dim", None) or text.hidden_size // heads
    rope: dict[str, Any] = dict(getattr(text, "rope_parameters", None) or {})
    if any(isinstance(part, Mapping) for part in rope.values()):  # by type of layer
        rope = dict(rope.get(FULL) or next(iter(rope.values())))
    fields = {
        "model_type": family,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "num_hidden_layers": 1,
        "hidden_act": getattr(text, "hidden_act", None) or text.hidden_activation,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
    }
    section = rope.get("mrope_section")
    if section and 2 * sum(section) == head_dim:
        interleaved = bool(rope.get("mrope_interleaved", False))
        fields["rope_scaling"] = {"type": "mrope", "mrope_section": section, "mrope_interleaved": interleaved}
    return fields

"""Tiny random Gemma 4 assistants, written by transformers' own classes. No pytest in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText


def make_assistant(base: str | Path, folder: str | Path, *, seed: int = 0, **settings: Any) -> Path:
    """Writes an assistant for a tiny Gemma 4. It often repeats the last token, as tiny models do.

    Args:
        base: folder of the target.
        settings: of the assistant's config, such as ``use_ordered_embeddings``.
    """
    torch.manual_seed(seed)
    text = AutoConfig.from_pretrained(base).get_text_config()
    full, sliding = (text.per_layer_config[f"{kind}_attention"] for kind in ("full", "sliding"))
    sizes = {name: getattr(text, name) for name in ("hidden_size", "num_attention_heads", "vocab_size")}
    unified = text.model_type == "gemma4_unified_text"
    plain = {} if unified else {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    config = getattr(transformers, f"Gemma4{'Unified' if unified else ''}AssistantConfig")(
        text_config={
            "model_type": text.model_type,
            **sizes,
            **plain,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "head_dim": sliding.head_dim,
            "num_key_value_heads": sliding.num_key_value_heads,
            "global_head_dim": full.head_dim,
            "num_global_key_value_heads": full.num_key_value_heads,
            "attention_k_eq_v": full.num_key_value_heads != sliding.num_key_value_heads,
            "sliding_window": text.sliding_window,
            "rope_parameters": text.rope_parameters,
            "final_logit_softcapping": 3.0,
        },
        backbone_hidden_size=text.hidden_size,
        **settings,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    target = AutoModelForImageTextToText.from_pretrained(base)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.25)
        size = text.hidden_size
        model.pre_projection.weight[:, size:] += 2 * torch.eye(size)
        model.post_projection.weight += 2 * torch.eye(size)
        model.lm_head.weight.copy_(target.get_output_embeddings().weight)
        if model.masked_embedding is not None:
            model.masked_embedding.token_ordering.copy_(torch.randperm(text.vocab_size))
    model.save_pretrained(folder)
    return Path(folder)

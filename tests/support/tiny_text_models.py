"""Tiny language models of any class of transformers, inside a LLaVA. No pytest in here.

text_types()                 model types of language models
llava_around(kind, base)     a LLaVA's target with that language model
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from eagle.families.llava.target import LlavaTarget

WINDOW = 24
SIZES: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "n_embed": 32, "dim": 32, "embedding_size": 32,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64, "decoder_ffn_dim": 64,
    "ffn_intermediate_size": 64, "feed_forward_size": 64, "block_ff_dim": 64, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 64,
    "intermediate_size_mlp": 64, "expert_ffn_hidden_size": 32, "ffn_size": 64,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "attention_head_dim": 8, "kv_channels": 8,
    "rotary_dim": 8, "rotary_ndims": 8,
    "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "top_k_experts": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "moe_num_shared_experts": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512, "max_sequence_length": 512,
    "max_target_positions": 512, "seq_length": 512, "max_source_positions": 512,
    "sliding_window": WINDOW, "attention_window": WINDOW, "attention_window_size": WINDOW, "window_size": WINDOW,
    "local_attention_window": WINDOW, "attention_chunk_size": WINDOW,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "mamba_expand": 1,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "lru_width": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": None, "query_pre_attn_scalar": 8,
    "word_embed_proj_dim": 32, "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
"""Values for whatever a config has of these names."""
MORE: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 2},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
"""What some types need beside `SIZES` to use their windows or to be valid at this size."""


def text_types() -> list[str]:
    """Model types of language models."""
    texts = [name for name in MODEL_MAPPING_NAMES if name.endswith(("_text", "_text_model"))]
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *texts})


def tiny_text_config(kind: str, vocabulary: int) -> PretrainedConfig:
    """A config of that model type with `SIZES`. Raises whatever its class raises."""
    default = AutoConfig.for_model(kind)
    known = {name: value for name, value in SIZES.items() if settable(default, name)}
    if "vocab_size_per_layer_input" in known:
        known["vocab_size_per_layer_input"] = vocabulary
    if settable(default, "layer_types") and "sliding_window" in known:
        known["layer_types"] = ["sliding_attention", "full_attention"] * 2
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = AutoConfig.for_model(kind, vocab_size=vocabulary, **{**known, **special, **MORE.get(kind, {})})
    if not hasattr(text, "tie_word_embeddings"):
        text.tie_word_embeddings = False
    return text


def settable(config: PretrainedConfig, name: str) -> bool:
    """Whether the config has that field and it is not computed from others."""
    field = getattr(type(config), name, None)
    if isinstance(field, property):
        return field.fset is not None
    try:
        return hasattr(config, name)
    except RuntimeError:  # one value for each layer
        return True


def llava_model(text: PretrainedConfig, base: LlavaTarget) -> LlavaForConditionalGeneration:
    """A LLaVA with the picture encoder of ``base`` and a language model of this config."""
    config = LlavaConfig(
        vision_config=base.config.vision_config,
        text_config=text,
        image_token_id=base.config.image_token_id,
        image_seq_length=base.config.image_seq_length,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "language_model" in name and "embed" not in name:
                weight.mul_(4)  # so that what a layer sees changes its tokens
    model.generation_config.eos_token_id = None
    return model

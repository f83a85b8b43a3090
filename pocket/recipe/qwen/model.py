"""The sizes of the pocket Qwen2-VL and its start: a stock Qwen2VLForConditionalGeneration that speaks already.

Its language model starts as that of the pocket LLaVA, which has the same sizes: with the biases of queries, keys and
values at zero and on text, where the three rows of M-RoPE positions are equal, both compute the same. What it has to
learn is to look at another tower's features at positions in three rows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from pocket.recipe.encode import Tokenizer
from pocket.recipe.model import TEXT as LLAMA

PATCH, MERGE = 8, 2
VISION: dict[str, Any] = {
    "depth": 5, "embed_dim": 160, "num_heads": 4, "mlp_ratio": 4, "hidden_size": LLAMA["hidden_size"],
    "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
}  # fmt: skip
ROPE: dict[str, Any] = {"type": "mrope", "mrope_section": [8, 12, 12]}
TEXT: dict[str, Any] = {
    name: LLAMA[name] for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
    )
}  # fmt: skip
TEXT |= {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_scaling": ROPE, "use_sliding_window": False}


def ids_of(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """The special tokens a configuration names."""
    named = {
        "eos_token_id": "<|im_end|>", "bos_token_id": "<|endoftext|>", "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>", "vision_token_id": "<|vision_pad|>",
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    }  # fmt: skip
    return {name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in named.items()}


def published_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """config.json as Qwen2-VL's are published: flat, `in_chans` for the channels."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "attention_dropout": 0.0,
        "initializer_range": 0.02, "max_window_layers": LLAMA["num_hidden_layers"], "sliding_window": 4096,
        "use_cache": True, "torch_dtype": "bfloat16", **TEXT, **ids_of(tokenizer),
        "vision_config": {**VISION, "in_chans": 3, "spatial_patch_size": PATCH},
    }  # fmt: skip


def _like(tokenizer: Qwen2Tokenizer, llava: Tokenizer) -> list[list[int]]:
    """For every token the LLaVA tokens of its text; none for special ones."""
    special = set(tokenizer.all_special_ids)
    out = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if token in special or "\ufffd" in text:
            out.append([])
        else:
            word = llava.start(text.strip()) if text.strip() else []
            inside = llava.go_on(text)
            out.append(word if word and len(word) < len(inside) else inside)
    return out


@torch.no_grad()
def take_over(model: Any, tokenizer: Qwen2Tokenizer, llava: Any, llava_tokenizer: Tokenizer) -> None:
    """Makes the language model that of the LLaVA; a token starts as the mean of those that spell its text there."""
    text, source = model.model.language_model, llava.model.language_model
    taken, own_layers = source.layers.state_dict(), text.layers.state_dict()
    text.layers.load_state_dict({name: taken.get(name, torch.zeros_like(w)) for name, w in own_layers.items()})
    text.norm.load_state_dict(source.norm.state_dict())
    spellings = _like(tokenizer, llava_tokenizer)
    for own, other in ((text.embed_tokens, source.embed_tokens), (model.lm_head, llava.lm_head)):
        known = other.weight
        own.weight.copy_(known.mean(0) + 0.5 * known.std(0) * torch.randn(own.weight.shape))
        for token, spelled in enumerate(spellings):
            if spelled:
                own.weight[token] = known[spelled].mean(0)
    end = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    model.lm_head.weight[end] = llava.lm_head.weight[llava.config.text_config.eos_token_id]
    model.lm_head.weight[len(tokenizer) :] = 0


def fresh(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2VLForConditionalGeneration:
    """A new model with random weights."""
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**published_config(tokenizer))).float()

"""The sizes of the pocket LLaVA and its fresh start as a stock LlavaForConditionalGeneration."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .encode import BOS, EOS, IMAGE_TOKEN_ID, IMAGE_TOKENS, SIDE
from .tokenizer import VOCABULARY

VISION = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 640,
    "image_size": SIDE, "patch_size": 16, "hidden_act": "quick_gelu", "projection_dim": 192,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 640, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0,
}  # fmt: skip


def config() -> LlavaConfig:
    """The configuration of the stock class."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )  # fmt: skip


def fresh(seed: int) -> LlavaForConditionalGeneration:
    """A new model that starts to learn sooner than one of the stock start, which is meant for wide models.

    Embeddings are wider, so that places and words stand apart at once; matrices keep the size of what they read, so
    that attention is not nearly even at first; the layers' outputs are the smaller the more layers add up.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config()).float()
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.normal_(0, 0.2)
        model.model.language_model.embed_tokens.weight.normal_(0, 0.05)
        for name, weight in model.model.language_model.layers.named_parameters():
            if weight.ndim == 2:
                output = name.split(".")[-2] in ("o_proj", "down_proj")
                share = (2 * TEXT["num_hidden_layers"]) ** -0.5 if output else 1.0
                weight.normal_(0, share * weight.shape[1] ** -0.5)
    return model


def parameter_count(model: torch.nn.Module) -> int:
    """The number of all weights."""
    return sum(p.numel() for p in model.parameters())

"""Sizes of the published base models, from their configs: the stock classes are built without memory and counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from eagle.doctor.memory import Footprint
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel

Model = tuple[type[PreTrainedModel], Any]  # class and config


def llava_15(layers: int, hidden: int, intermediate: int, heads: int) -> Model:
    """LLaVA-1.5 with the published vocabulary and CLIP tower (ViT-L/14, 336 pixels)."""
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=32000,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    return LlavaForConditionalGeneration, LlavaConfig(text_config=text, vision_config=tower)


def qwen2_vl(hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> Model:
    """Qwen2-VL with the published tower; 28 layers in the sizes listed below."""
    text = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 28, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": tied,
    }  # fmt: skip
    tower = {"hidden_size": hidden, "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
    config = Qwen2VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied)
    return Qwen2VLForConditionalGeneration, config


PUBLISHED: dict[str, Callable[[], Model]] = {
    "LLaVA-1.5-7B": partial(llava_15, 32, 4096, 11008, 32),
    "LLaVA-1.5-13B": partial(llava_15, 40, 5120, 13824, 40),
    "Qwen2-VL-2B": partial(qwen2_vl, 1536, 8960, 12, 2, 151936, True),
    "Qwen2-VL-7B": partial(qwen2_vl, 3584, 18944, 28, 4, 152064, False),
}


def footprint(name: str) -> Footprint:
    """A published model and the draft that belongs to it."""
    model_class, config = PUBLISHED[name]()
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    text = config.get_text_config()
    heads = text.num_key_value_heads
    cache = 2 * (text.num_hidden_layers + 1) * heads * (text.hidden_size // text.num_attention_heads)
    return Footprint(elements(model), draft_elements(text, config.model_type), cache)


def draft_elements(text: Any, family: str) -> int:
    """The draft of a base with this text config, its copy of the token embedding included."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    fields = {name: getattr(text, name) for name in names}
    with torch.device("meta"):
        return elements(DraftModel(DraftConfig.from_dict({**fields, "model_type": family})))


def elements(model: torch.nn.Module) -> int:
    """Elements of all parameters, shared ones once."""
    return sum({id(p): p.numel() for p in model.parameters()}.values())

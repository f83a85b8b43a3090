"""Tiny checkpoints of the families that transformers reads as they are, with random weights and true processors.

    make_qwen(folder)                        Qwen2-VL; version="2.5" for Qwen2.5-VL
    make_llava_next(folder)                  LLaVA-1.6

No pytest in here: any package's tests may import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tiny_tokenizer import CORPUS, tokenizer_size, write_tokenizer_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from llava.hub import Source
from llava.tokenizer import load_tokenizer

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip


def silence_specials(model: PreTrainedModel, ids: list[int]) -> None:
    """No special token is produced by chance."""
    if not model.config.get_text_config().tie_word_embeddings:
        with torch.no_grad():
            model.get_output_embeddings().weight[ids] = 0


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        additional_special_tokens=list(QWEN_SPECIAL),
    )  # fmt: skip


def make_qwen(
    folder: str | Path, *, version: Literal["2", "2.5"] = "2", tied: bool = False, seed: int = 0, **text: Any
) -> Path:
    """Writes a Qwen2-VL or Qwen2.5-VL and returns its folder; ``text`` changes the text configuration."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    ids = dict(zip(QWEN_SPECIAL, tokenizer.convert_tokens_to_ids(list(QWEN_SPECIAL)), strict=True))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    config: dict[str, Any] = {
        "text_config": {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope, "tie_word_embeddings": tied,
                        "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], **text},
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tied,
    }  # fmt: skip
    model: PreTrainedModel
    if version == "2":
        config["vision_config"] = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))
    else:
        config["vision_config"] = {
            "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
            "fullatt_block_indexes": [1], "tokens_per_second": 2,
        }  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    silence_specials(model, list(ids.values()))
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    published = {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.0}
    model.generation_config.update(**published)
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    limits = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    processor = (Qwen2VLProcessor if version == "2" else Qwen2_5_VLProcessor)(
        Qwen2VLImageProcessor(**limits), tokenizer, Qwen2VLVideoProcessor(**limits), chat_template=QWEN_TEMPLATE
    )
    processor.save_pretrained(folder)
    return Path(folder)


def make_llava_next(folder: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Writes a LLaVA-1.6 of four tiles at most and returns its folder; ``text`` changes the text configuration."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    write_tokenizer_model(folder)
    tokenizer = load_tokenizer(Source(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**TEXT, **text}, vocab_size=tokenizer_size() + 2, eos_token_id=2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config)
    silence_specials(model, [0, 1, 2, tokenizer_size(), tokenizer_size() + 1])
    model.save_pretrained(folder)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.save_pretrained(folder)
    return folder

"""Tiny checkpoints of today's families, with random weights and true processors.

    make_qwen3_vl(folder)        Qwen3-VL; moe=True for the one with experts
    make_qwen3_5(folder)         Qwen3.5; moe=True for the one with experts
    make_gemma3(folder)          Gemma 3
    make_internvl(folder)        InternVL around a Qwen2
    make_onevision(folder)       LLaVA-OneVision around a Qwen2

No pytest in here: any package's tests may import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_stock import QWEN_SPECIAL, QWEN_TEMPLATE, TEXT, silence_specials
from tiny_tokenizer import CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

GEMMA_SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for message in turns %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ first if loop.first else '' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INTERN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
INTERN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% elif part['type'] == 'video' %}<video>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONEVISION_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
ONEVISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}<video>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE = 28


def byte_tokenizer(special: tuple[str, ...], eos: str, pad: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the given special tokens, some of which the processor knows by name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    others = [token for token in special if token not in (*named.values(), eos, pad)]
    tokens = {**named, **{f"special_{number}": token for number, token in enumerate(others)}}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        extra_special_tokens=tokens,
        bos_token="<bos>" if "<bos>" in special else None,
    )
    if fast.bos_token:  # as published, it begins every text with this token
        begin = [(fast.bos_token, fast.bos_token_id)]
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=begin)
    return fast


def _save(model: PreTrainedModel, processor: Any, ids: dict[str, int], eos: str, pad: str, folder: str | Path) -> Path:
    silence_specials(model, list(ids.values()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "language_model" in name and "embed" not in name:
                weight.mul_(3)  # so that what a layer sees changes its tokens
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids[eos], ids[pad]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _ids(tokenizer: PreTrainedTokenizerFast, special: tuple[str, ...]) -> dict[str, int]:
    return dict(zip(special, tokenizer.convert_tokens_to_ids(list(special)), strict=True))


def make_qwen3_vl(folder: str | Path, *, moe: bool = False, seed: int = 0, patch: int = 14, **text: Any) -> Path:
    """Writes a Qwen3-VL of three text layers, two of which get DeepStack features; ``patch``: side of a patch."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(QWEN_SPECIAL, "<|im_end|>", "<|endoftext|>")
    ids = _ids(tokenizer, QWEN_SPECIAL)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 5e6}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    config: dict[str, Any] = {
        "text_config": {
            **TEXT,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
            **(experts if moe else {}),
            **text,
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": patch,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    model: PreTrainedModel = (
        Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config))
        if moe
        else Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    )
    sizes = {"patch_size": patch, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen3VLVideoProcessor(**sizes), chat_template=QWEN_TEMPLATE
    )
    return _save(model, processor, ids, "<|im_end|>", "<|endoftext|>", folder)


def make_qwen3_5(folder: str | Path, *, moe: bool = False, seed: int = 0, patch: int = 14, **text: Any) -> Path:
    """Writes a Qwen3.5 of four text layers, three of which have linear attention; ``patch``: side of an image patch."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(QWEN_SPECIAL, "<|im_end|>", "<|endoftext|>")
    ids = _ids(tokenizer, QWEN_SPECIAL)
    rope = {
        "rope_type": "default",
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.5,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    config: dict[str, Any] = {
        "text_config": {
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
            **(experts if moe else {}),
            **text,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": patch,
            "num_position_embeddings": 16,
        },
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    model: PreTrainedModel = (
        Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**config))
        if moe
        else Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))
    )
    sizes = {"patch_size": patch, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen3VLVideoProcessor(**sizes), chat_template=QWEN_TEMPLATE
    )
    return _save(model, processor, ids, "<|im_end|>", "<|endoftext|>", folder)


def make_gemma3(folder: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Writes a Gemma 3 whose pictures have 4 tokens and whose window has 24."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(
        GEMMA_SPECIAL,
        "<eos>",
        "<pad>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    ids = _ids(tokenizer, GEMMA_SPECIAL)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 7,
    }
    config = Gemma3Config(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "vocab_size": len(tokenizer),
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "eos_token_id": ids["<end_of_turn>"],
            "bos_token_id": ids["<bos>"],
            "pad_token_id": ids["<pad>"],
            **text,
        },
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        eos_token_id=[ids["<eos>"], ids["<end_of_turn>"]],
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.5)  # zeros before
    images = Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = Gemma3Processor(images, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4)
    return _save(model, processor, ids, "<end_of_turn>", "<pad>", folder)


def make_internvl(folder: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Writes an InternVL of four tiles at most, 4 tokens each."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(
        INTERN_SPECIAL,
        "<|im_end|>",
        "<|endoftext|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    ids = _ids(tokenizer, INTERN_SPECIAL)
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": False,
            **text,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [SIDE, SIDE],
            "patch_size": [7, 7],
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    size = {"height": SIDE, "width": SIDE}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=INTERN_TEMPLATE,
    )
    return _save(model, processor, ids, "<|im_end|>", "<|endoftext|>", folder)


def make_onevision(folder: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Writes a LLaVA-OneVision of four tiles at most."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(ONEVISION_SPECIAL, "<|im_end|>", "<|endoftext|>")
    ids = _ids(tokenizer, ONEVISION_SPECIAL)
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": False,
            **text,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 7,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    return _save(model, processor, ids, "<|im_end|>", "<|endoftext|>", folder)

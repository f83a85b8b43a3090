"""Tiny checkpoints of today's families, with random weights and true processors.

    make_qwen3_vl(folder)        Qwen3-VL; moe=True for the one with experts
    make_qwen3_5(folder)         Qwen3.5; moe=True for the one with experts
    make_gemma3(folder)          Gemma 3
    make_gemma4(folder)          Gemma 4; kind="experts", "plain" or "unified" for the larger ones
    make_mistral3(folder)        Mistral 3
    make_glm(folder, kind)       kind: glm4v, glm4v_moe, glm46v or glm_ocr
    make_paddleocr(folder)       PaddleOCR-VL
    make_internvl(folder)        InternVL around a Qwen2
    make_onevision(folder)       LLaVA-OneVision around a Qwen2

Classes of transformers are looked up when they are used, as older releases lack some. No pytest in here: any package's
tests may import it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_llava import make_llava_hf
from tiny_stock import QWEN_SPECIAL, QWEN_TEMPLATE, TEXT, make_llava_next, make_qwen, silence_specials
from tiny_tokenizer import CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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
GEMMA4_SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|image>",
    "<|image|>",
    "<image|>",
    "<|video|>",
    "<|audio>",
    "<|audio|>",
    "<audio|>",
)
GEMMA4_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% elif part['type'] == 'video' %}<|video|>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}"
)
MISTRAL_SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
)
MISTRAL_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'system' %}[SYSTEM_PROMPT]"
    "{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]{% elif message['role'] == 'user' %}[INST]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '[IMG]' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}[/INST]"
    "{% else %}{{ message['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
)
GLM_SPECIAL = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<think>",
    "</think>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\nTHOUGHT{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif part['type'] == 'video' %}<|begin_of_video|><|video|><|end_of_video|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PADDLE_SPECIAL = (
    "<unk>",
    "</s>",
    "<|begin_of_sentence|>",
    "<|IMAGE_START|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_END|>",
    "<|video_pad|>",
)
PADDLE_TEMPLATE = (
    "<|begin_of_sentence|>{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant:\n' + message['content'][0]['text'] + '</s>' }}"
    "{% else %}{{ message['content'][0]['text'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
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


def byte_tokenizer(special: tuple[str, ...], eos: str, pad: str, **named: str) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with the given special tokens, some of which the processor knows by name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    others = [token for token in special if token not in (*named.values(), eos, pad)]
    tokens = {**named, **{f"special_{number}": token for number, token in enumerate(others)}}
    fast = transformers.PreTrainedTokenizerFast(
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


def _save(
    model: transformers.PreTrainedModel, processor: Any, ids: dict[str, int], eos: str, pad: str, folder: str | Path
) -> Path:
    silence_specials(model, list(ids.values()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "language_model" in name and "embed" not in name:
                weight.mul_(3)  # so that what a layer sees changes its tokens
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids[eos], ids[pad]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _ids(tokenizer: transformers.PreTrainedTokenizerFast, special: tuple[str, ...]) -> dict[str, int]:
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
    model: transformers.PreTrainedModel = (
        transformers.Qwen3VLMoeForConditionalGeneration(transformers.Qwen3VLMoeConfig(**config))
        if moe
        else transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**config))
    )
    sizes = {"patch_size": patch, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**sizes),
        chat_template=QWEN_TEMPLATE,
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
    model: transformers.PreTrainedModel = (
        transformers.Qwen3_5MoeForConditionalGeneration(transformers.Qwen3_5MoeConfig(**config))
        if moe
        else transformers.Qwen3_5ForConditionalGeneration(transformers.Qwen3_5Config(**config))
    )
    sizes = {"patch_size": patch, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**sizes),
        chat_template=QWEN_TEMPLATE,
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
    config = transformers.Gemma3Config(
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
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.5)  # zeros before
    images = transformers.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = transformers.Gemma3Processor(images, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4)
    return _save(model, processor, ids, "<end_of_turn>", "<pad>", folder)


def make_gemma4(folder: str | Path, *, kind: str = "small", seed: int = 0, **text: Any) -> Path:
    """Writes a Gemma 4 whose pictures have 70 tokens at most and whose window has 24.

    Args:
        kind: "small": what layers read of the tokens, and shared keys and values; "plain": pictures whose tokens see
            each other, and keys that are the values; "experts": as plain, with experts; "unified": as plain, without an
            encoder of pictures.
    """
    torch.manual_seed(seed)
    tokens = {"image": "<|image|>", "boi": "<|image>", "eoi": "<image|>"}
    tokens |= {"audio": "<|audio|>", "boa": "<|audio>", "eoa": "<audio|>"}
    tokenizer = byte_tokenizer(
        GEMMA4_SPECIAL, "<eos>", "<pad>", **{f"{name}_token": token for name, token in tokens.items()}
    )
    ids = _ids(tokenizer, GEMMA4_SPECIAL)
    small = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    plain = {
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    }
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    kinds = {"small": small, "plain": plain, "experts": {**plain, **experts}}
    kinds["unified"] = {name: value for name, value in plain.items() if name != "hidden_size_per_layer_input"}

    def part(name: str) -> Any:
        return getattr(transformers, ("Gemma4Unified" if kind == "unified" else "Gemma4") + name)

    sizes = {"patch_size": 4, "pooling_kernel_size": 2}
    unified = {**sizes, "mm_embed_dim": 16, "mm_posemb_size": 128, "output_proj_dims": 16}
    vision = {
        **sizes,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "position_embedding_size": 128,
    }
    config = part("Config")(
        text_config={
            **TEXT,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "head_dim": 8,
            "global_head_dim": 16,
            "vocab_size": len(tokenizer),
            "vocab_size_per_layer_input": len(tokenizer),
            "sliding_window": 24,
            "final_logit_softcapping": 3.0,
            "eos_token_id": ids["<turn|>"],
            "bos_token_id": ids["<bos>"],
            "pad_token_id": ids["<pad>"],
            **kinds[kind],
            **text,
        },
        vision_config=unified if kind == "unified" else vision,
        audio_config=None,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
    )
    model = part("ForConditionalGeneration")(config)
    sizes["max_soft_tokens"] = 70
    with torch.no_grad():
        table = model.get_input_embeddings().weight.mul_(
            8
        )  # it is also the head: logits of a size that the cap changes
        table[[config.image_token_id, config.video_token_id, config.audio_token_id]] = 0  # not said by chance
    processor = part("Processor")(
        part("AudioFeatureExtractor")(),
        part("ImageProcessor")(**sizes),
        tokenizer,
        part("VideoProcessor")(**sizes),
        chat_template=GEMMA4_TEMPLATE,
        image_seq_length=70,
    )
    return _save(model, processor, ids, "<turn|>", "<pad>", folder)


def make_mistral3(folder: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Writes a Mistral 3 around a Mistral."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(MISTRAL_SPECIAL, "</s>", "<pad>")
    ids = _ids(tokenizer, MISTRAL_SPECIAL)
    config = transformers.Mistral3Config(
        text_config={
            "model_type": "mistral",
            **TEXT,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "sliding_window": None,
            "eos_token_id": ids["</s>"],
            "tie_word_embeddings": False,
            **text,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 56,
            "patch_size": 7,
        },
        image_token_index=ids["[IMG]"],
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    model = transformers.Mistral3ForConditionalGeneration(config)
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=7),
        tokenizer,
        patch_size=7,
        spatial_merge_size=2,
        chat_template=MISTRAL_TEMPLATE,
    )
    return _save(model, processor, ids, "</s>", "<pad>", folder)


def make_glm(folder: str | Path, kind: str = "glm4v", *, moe: bool = False, seed: int = 0, **text: Any) -> Path:
    """Writes a GLM-4.1V, GLM-4.5V, GLM-4.6V or GLM-OCR. ``moe``: a text model with experts."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(
        GLM_SPECIAL, "<|endoftext|>", "<|endoftext|>", image_token="<|image|>", video_token="<|video|>"
    )
    ids = _ids(tokenizer, GLM_SPECIAL)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    if moe:
        text["model_type"] = "glm4v_moe_text"
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
        text = {**experts, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, **text}
        rope |= {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    config: dict[str, Any] = {
        "text_config": {
            **TEXT,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
            **text,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 14,
            "image_size": 56,
        },
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
        "tie_word_embeddings": False,
    }
    classes: dict[str, tuple[Any, Any]] = {
        "glm4v": (transformers.Glm4vForConditionalGeneration, transformers.Glm4vConfig),
        "glm4v_moe": (transformers.Glm4vMoeForConditionalGeneration, transformers.Glm4vMoeConfig),
        "glm46v": (transformers.Glm46VForConditionalGeneration, transformers.Glm46VConfig),
        "glm_ocr": (transformers.GlmOcrForConditionalGeneration, transformers.GlmOcrConfig),
    }
    model_class, config_class = classes[kind]
    processors: tuple[Any, Any, Any] = (
        transformers.Glm46VProcessor,
        transformers.Glm46VImageProcessor,
        transformers.Glm46VVideoProcessor,
    )
    if kind.startswith("glm4v"):
        processors = (transformers.Glm4vProcessor, transformers.Glm4vImageProcessor, transformers.Glm4vVideoProcessor)
    sizes = {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 2 * 112 * 112}}
    thought = "{{ '<think></think>\n' if message['role'] == 'assistant' else '' }}" if kind == "glm46v" else ""
    processor = processors[0](
        processors[1](**sizes),
        tokenizer,
        processors[2](**sizes),
        chat_template=GLM_TEMPLATE.replace("THOUGHT", thought),
    )
    return _save(model_class(config_class(**config)), processor, ids, "<|endoftext|>", "<|endoftext|>", folder)


def make_paddleocr(folder: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Writes a PaddleOCR-VL."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(PADDLE_SPECIAL, "</s>", "<unk>", image_token="<|IMAGE_PLACEHOLDER|>")
    ids = _ids(tokenizer, PADDLE_SPECIAL)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 5e5}
    config = transformers.PaddleOCRVLConfig(
        text_config={
            **TEXT,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "eos_token_id": ids["</s>"],
            "pad_token_id": ids["<unk>"],
            "tie_word_embeddings": False,
            **text,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_id=ids["<|IMAGE_PLACEHOLDER|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|IMAGE_START|>"],
        vision_end_token_id=ids["<|IMAGE_END|>"],
        tie_word_embeddings=False,
    )
    sizes = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    processor = transformers.PaddleOCRVLProcessor(
        transformers.PaddleOCRVLImageProcessor(**sizes), tokenizer, chat_template=PADDLE_TEMPLATE
    )
    return _save(transformers.PaddleOCRVLForConditionalGeneration(config), processor, ids, "</s>", "<unk>", folder)


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
    config = transformers.InternVLConfig(
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
    model = transformers.InternVLForConditionalGeneration(config)
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=size),
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
    config = transformers.LlavaOnevisionConfig(
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
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    return _save(model, processor, ids, "<|im_end|>", "<|endoftext|>", folder)


FAMILY_MAKERS: dict[str, Callable[[str | Path], Path]] = {
    "qwen3_vl": make_qwen3_vl,
    "qwen3_vl_moe": partial(make_qwen3_vl, moe=True),
    "qwen3_5": make_qwen3_5,
    "qwen3_5_moe": partial(make_qwen3_5, moe=True),
    "gemma3": make_gemma3,
    "gemma4": make_gemma4,
    "gemma4-plain": partial(make_gemma4, kind="plain"),
    "gemma4-experts": partial(make_gemma4, kind="experts"),
    "gemma4_unified": partial(make_gemma4, kind="unified"),
    "internvl": make_internvl,
    "mistral3": make_mistral3,
    "glm4v": make_glm,
    "glm4v_moe": partial(make_glm, kind="glm4v_moe", moe=True),
    "glm46v": partial(make_glm, kind="glm46v"),
    "glm46v-experts": partial(make_glm, kind="glm46v", moe=True),
    "glm_ocr": partial(make_glm, kind="glm_ocr"),
    "paddleocr_vl": make_paddleocr,
    "llava_onevision": make_onevision,
}
"""Makers of every checkpoint here, by family, and variant of it after a dash."""
ALL_MAKERS: dict[str, Callable[[str | Path], Path]] = {
    "llava": make_llava_hf,
    "llava_next": make_llava_next,
    "qwen2_vl": make_qwen,
    "qwen2_5_vl": partial(make_qwen, version="2.5"),
    **FAMILY_MAKERS,
}
"""The same with the older families."""

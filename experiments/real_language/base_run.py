"""Writes a Llama model as a LLaVA checkpoint with a tiny random vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from eagle import MSDModel
from eagle.provenance import record
from llava.checkpoint import quiet_transformers
from llava.files import atomic_folder, write_json
from llava.layout import count_image_tokens
from llava.loading import load_errors
from llava.processor_files import ImageProcessor

UNUSED = "<empty_output>"
"""A special token of the vocabulary that stands for a picture, so that no row is added to ``lm_head``."""
TOWER = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)


def read_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The stock model in float32, and the tokenizer, of SmolLM2's GGUF file."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with load_errors("the GGUF file cannot be read", path), quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(**place)
    # transformers does not read how the file's tokenizer ("smollm") splits text: each digit is a piece of its own
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model, tokenizer


def write_base(stock: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, source: str) -> None:
    """Writes a checkpoint in the llava-hf layout.

    Args:
        stock: the language model; its weights and generation config are kept.
        tokenizer: has a chat template, and a token `UNUSED`.
        folder: appears complete or not at all; must be empty or absent.
        source: where the language model is from, for ``provenance.json``.
    """
    text = {name: value for name, value in stock.config.to_dict().items() if not name.startswith("_")}
    text.pop("quantization_config", None)  # the weights are written as float32
    config = LlavaConfig(
        text_config=text,
        vision_config=TOWER,
        image_token_index=tokenizer.convert_tokens_to_ids(UNUSED),
        image_seq_length=count_image_tokens(TOWER, "default"),
        dtype="float32",
    )
    torch.manual_seed(0)  # of the tower
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(stock.model.state_dict())
    model.lm_head.load_state_dict(stock.lm_head.state_dict())
    model.generation_config = stock.generation_config
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        side = TOWER.image_size
        ImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(temporary)
        write_json(temporary / "provenance.json", {**record(), "language_model": source})


def different_answers(
    stock: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, prompts: Sequence[str], length: int
) -> list[str]:
    """The prompts to which a written base gives other tokens than its language model in transformers' `generate`."""
    base = MSDModel.from_pretrained(folder, dtype="float32")
    different = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = stock.generate(**inputs, do_sample=False, max_new_tokens=length)
        own = base.target.prepare(base.target.chat_prompt(prompt))
        if not torch.equal(expected, base.generate(**own, max_new_tokens=length).sequences):
            different.append(prompt)
    return different

"""A small vocabulary in Qwen2's own form: byte-level BPE, Qwen2-VL's special tokens behind it.

Qwen2 splits numbers into digits. Here a number or year with the space before it is one token, an added one, so that a
small model reads it off a picture in one look, as the pocket LLaVA does.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from pocket.recipe.tokenizer import numbers, sentences

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
SIZE = 2040
"""Tokens in all; the model has a few rows more, as the published ones do."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text before BPE; transformers' Qwen2Tokenizer has it built in."""
SYSTEM = "You are a helpful assistant."
"""What Qwen2-VL's template says first."""
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
SENTENCES = 4000


def train_tokenizer(folder: Path, seed: int = 0, number: int = SENTENCES) -> None:
    """Writes the tokenizer's files into a folder; it learns from `number` conversations."""
    added = [f" {number}" for number in dict.fromkeys(numbers())]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), letters])
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(SPECIAL) - len(added), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    spoken = [line.removeprefix("USER: ").removesuffix(" ASSISTANT:") for line in sentences(number, seed)]
    roles = [SYSTEM, "system", "user", "assistant"] * 100
    bpe.train_from_iterator(spoken + roles, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"], merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]), model_max_length=4096, padding_side="left",
    )  # fmt: skip
    tokenizer.add_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(learnt["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """The tokenizer of a folder."""
    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    return tokenizer

"""Train the SentencePiece tokenizer on the recipe's own text: python -m pocket.recipe.tokenizer --out DIR"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from random import Random

from llava.arguments import OneLineParser
from llava.errors import run_cli

from .encode import SYSTEM
from .english import topics
from .sample import converse
from .tables import tables

VOCABULARY = 2048
CONFIG = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "pad_token": "<unk>", "legacy": False, "model_max_length": 2048, "padding_side": "right", "sp_model_kwargs": {},
    "clean_up_tokenization_spaces": False, "tokenizer_class": "LlamaTokenizer",
}  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


NUMBERS, NUMBER_LINES = 101, 400


def sentences(number: int, seed: int) -> list[str]:
    """What a tokenizer learns from: conversations and every English paragraph."""
    rng = Random(f"tokenizer-{seed}")
    lines = []
    for _ in range(number):
        lines += [s for t in converse(rng, text_share=0.05).turns for s in (f"USER: {t.question} ASSISTANT:", t.answer)]
    for topic in topics():
        lines += [topic.name, *topic.paragraphs] * 3
    return lines


def numbers() -> list[str]:
    """The numbers and years that are one token each."""
    years = {period for table in tables() for row in table.rows.values() for period in row}
    return [str(n) for n in (*range(NUMBERS), *sorted(years))]


def corpus(number: int, seed: int) -> list[str]:
    """The sentences, the system prompt and the numbers.

    Numbers stand alone in them, and each occurs often, so that a number or a year is one token whatever follows it.
    """
    lines = sentences(number, seed) + [SYSTEM] * -(-number // 4)
    lines += [n for n in numbers() for _ in range(NUMBER_LINES)]
    return [re.sub(r" *(\d+) *", r" \1 ", line).strip() for line in lines]


def train_tokenizer(folder: Path, number: int = 4000, seed: int = 0) -> None:
    """Write tokenizer.model and its two JSON files into the folder."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(number, seed)), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY,
        model_type="bpe", byte_fallback=True, split_digits=False, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        allow_whitespace_only_pieces=True, num_threads=2, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL, indent=1))


def main() -> None:
    """Command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train_tokenizer(args.out, seed=args.seed)


if __name__ == "__main__":
    sys.exit(run_cli(main))

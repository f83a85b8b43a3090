"""Gives a draft a trimmed vocabulary: the tokens that its training data's answers use most.

    python -m eagle.ge_data.vocabulary --draft CKPT/final --data DT DV --size 32000

The draft then drafts from these tokens alone, so its head reads fewer rows; the target still verifies with all of them,
so answers do not change. Worth it where the vocabulary is large and the head is what a draft step waits for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from eagle.arguments import positive
from eagle.drafts.config import DraftConfig
from eagle.drafts.draft_vocab import write_draft_vocab
from eagle.hidden_states.index import load_index, open_shard
from llava.errors import UserError, run_cli


def count_tokens(folders: Iterable[Path], vocab_size: int) -> Tensor:
    """How often each token occurs in answers, [V] int64.

    Raises:
        UserError: a folder is no corpus, or of another vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for folder in folders:
        index = load_index(folder)
        if index.source.vocab_size != vocab_size:
            found = index.source.vocab_size
            raise UserError(f"a vocabulary of {found}, the draft's has {vocab_size} tokens", folder)
        for shard in tqdm(index.shards, desc=str(folder), unit="shard", file=sys.stderr):
            with open_shard(folder / shard.file) as tensors:
                ids, spoken = tensors.get_tensor("input_ids").long(), tensors.get_tensor("loss_mask").bool()
            counts += torch.bincount(ids[spoken], minlength=vocab_size)
    return counts


def most_frequent(counts: Tensor, size: int) -> tuple[Tensor, float]:
    """The ``size`` most frequent tokens that occur at all [K], and their share of all occurrences."""
    order = counts.argsort(descending=True, stable=True)[:size]
    tokens = order[counts[order] > 0]
    return tokens, float(counts[tokens].sum() / counts.sum().clamp(min=1))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m eagle.ge_data.vocabulary", description=__doc__.splitlines()[0])
    parser.add_argument("--draft", required=True, type=Path, help="folder of the draft; its config is changed")
    parser.add_argument("--data", required=True, type=Path, nargs="+", help="folders of hidden states")
    parser.add_argument("--size", type=positive, default=32_000, help="tokens at most (default: 32000)")
    options = parser.parse_args(argv)
    config = DraftConfig.from_json(options.draft)
    tokens, share = most_frequent(count_tokens(options.data, config.vocab_size), options.size)
    if not tokens.numel():
        raise UserError("no answer in this data", options.data[0], "is it made by eagle.ge_data.allocation?")
    write_draft_vocab(options.draft, tokens)
    Console().print(
        f"{len(tokens):,} of {config.vocab_size:,} tokens, {share:.2%} of what the answers say: {options.draft}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

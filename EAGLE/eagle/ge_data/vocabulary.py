"""Give a draft a smaller vocabulary: the most frequent tokens in the answers of its training data.

    python -m eagle.ge_data.vocabulary --draft CKPT/final --data DT DV --size 32000
    python -m eagle.ge_data.vocabulary --draft DRAFT --annotations text.json image.json --base BASE

The draft then proposes only these tokens, which makes its head smaller. The target verifies with the whole vocabulary,
so that answers do not change. Useful if the vocabulary is large and the head dominates the time of a draft step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from eagle.arguments import positive
from eagle.ge_data.progress import progress_bar
from eagle.hidden_states.index import load_index, open_shard
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli

if TYPE_CHECKING:
    from torch import Tensor


def count_tokens(folders: Iterable[Path], vocab_size: int) -> Tensor:
    """Number of occurrences of each token in answers, [V] int64.

    Raises:
        UserError: a folder is not a corpus, or has another vocabulary.
    """
    import torch

    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for folder in folders:
        index = load_index(folder)
        if index.source.vocab_size != vocab_size:
            found = index.source.vocab_size
            raise UserError(f"a vocabulary of {found}, the draft's has {vocab_size} tokens", folder)
        with progress_bar(str(folder), " shards", len(index.shards)) as bar:
            for shard in index.shards:
                with open_shard(folder / shard.file) as tensors:
                    ids, loss_mask = tensors.get_tensor("input_ids").long(), tensors.get_tensor("loss_mask").bool()
                counts += torch.bincount(ids[loss_mask], minlength=vocab_size)
                bar.update(1)
    return counts


def count_answer_tokens(files: Iterable[Path], base: str, vocab_size: int) -> Tensor:
    """As `count_tokens`, from annotation files: answers as the base's tokenizer encodes them alone, each with the end
    tokens. Records that the training templates do not write are left out.

    Raises:
        UserError: a file is damaged, or the tokenizer cannot be loaded or has another vocabulary.
    """
    import torch
    from transformers import GenerationConfig

    from eagle.conversations import Unusable, read_conversation
    from eagle.families import family_of
    from eagle.ge_data.annotations import iter_records

    tokenizer = family_of(base).template_class().load_processor(base).tokenizer
    ends = {tokenizer.eos_token_id}
    with suppress(OSError):  # a checkpoint may have none
        named = GenerationConfig.from_pretrained(base).eos_token_id
        ends |= set(named if isinstance(named, list) else [named])
    ends.discard(None)
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for path in files:
        with progress_bar(str(path), "B", path.stat().st_size if path.is_file() else None) as bar:
            for number, record in enumerate(iter_records(path)):
                bar.update(record.end - bar.n)
                try:
                    answers = [answer for _, answer in read_conversation(record.value, number).turns]
                except Unusable:
                    continue
                encoded = tokenizer(answers, add_special_tokens=False).input_ids
                ids = torch.tensor([token for own in encoded for token in [*own, *ends]], dtype=torch.int64)
                if ids.numel() and int(ids.max()) >= vocab_size:
                    what = f"its tokenizer has token {int(ids.max())}, the draft a vocabulary of {vocab_size}"
                    raise UserError(what, base, "name the base that the draft was made for")
                counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def most_frequent(counts: Tensor, size: int) -> tuple[Tensor, float]:
    """The ``size`` most frequent tokens [K], without those that never occur, and their share of all occurrences."""
    order = counts.argsort(descending=True, stable=True)[:size]
    tokens = order[counts[order] > 0]
    return tokens, float(counts[tokens].sum() / counts.sum().clamp(min=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    about = (__doc__ or "").splitlines()[0]
    parser = OneLineParser(prog="python -m eagle.ge_data.vocabulary", description=about)
    parser.add_argument("--draft", required=True, type=Path, help="folder of the draft; its config is changed")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders of hidden states")
    parser.add_argument("--annotations", type=Path, nargs="+", default=[], help="or annotation files, with --base")
    parser.add_argument("--base", help="base model whose tokenizer encodes the annotation files")
    parser.add_argument("--size", type=positive, default=32_000, help="tokens at most (default: 32000)")
    options = parser.parse_args(argv)
    if not (options.data or options.annotations):
        raise UserError("no data", fix="give --data, or --annotations and --base")
    if bool(options.annotations) != bool(options.base):
        raise UserError("--annotations and --base belong together", fix="give both or none of them")
    from eagle.drafts.config import DraftConfig
    from eagle.drafts.draft_vocab import write_draft_vocab

    config = DraftConfig.from_json(options.draft)
    counts = count_tokens(options.data, config.vocab_size)
    if options.base:
        counts += count_answer_tokens(options.annotations, options.base, config.vocab_size)
    tokens, share = most_frequent(counts, options.size)
    if not tokens.numel():
        raise UserError("this data has no answers", [*options.data, *options.annotations][0])
    write_draft_vocab(options.draft, tokens)
    print(f"{len(tokens):,} of {config.vocab_size:,} tokens, {share:.2%} of all tokens in answers: {options.draft}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Show the content of a corpus and check that it is complete.

    python -m eagle.ge_data.inspect D [--model BASE] [--sample I]

One sample is shown as text. The tokenizer is that of --model, or of the model that the shards name, if that is a hub
name or a folder here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eagle.ge_data.progress import checksum_bar, format_bytes
from eagle.hidden_states.index import INDEX, MAKE_AGAIN, Index, load_index, sha256
from llava.arguments import OneLineParser, count
from llava.errors import UserError, run_cli

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text
    from torch import Tensor

    from eagle.hidden_states.shards import Sample, ShardDataset

BINS = 8
BAR = 40
ASK = "give --model BASE to see a sample as text"


def check(folder: Path, index: Index) -> int:
    """Compares every shard with its checksum and with the index; returns the number of shards without a checksum.

    Raises:
        UserError: a shard was changed, or contradicts the index.
    """
    from eagle.hidden_states.shards import ShardReader

    without = 0
    with checksum_bar(index.bytes) as bar:
        for shard in index.shards:
            if shard.sha256 is None:
                without += 1
            elif sha256(folder / shard.file) != shard.sha256:
                raise UserError("shard was changed, its checksum differs", folder / shard.file, MAKE_AGAIN)
            ShardReader(folder / shard.file, shard, index.source)
            bar.update(shard.bytes)
    return without


def histogram(lengths: Tensor) -> list[str]:
    """Lines of a text histogram of lengths [N]."""
    import torch

    low, high = int(lengths.min()), int(lengths.max())
    edges = torch.linspace(low, high + 1, min(BINS, high + 1 - low) + 1).round().long()
    counts = torch.histogram(lengths.float(), edges.float()).hist.long()
    most = int(counts.max())
    return [
        f"{int(first):>6} - {int(last) - 1:<6} {'█' * max(round(BAR * int(n) / most), int(n > 0)):<{BAR}} {int(n):,}"
        for first, last, n in zip(edges, edges[1:], counts, strict=False)
    ]


def table(data: ShardDataset, without: int) -> Table:
    """Numbers of the corpus."""
    from rich.table import Table

    meta, images = data.meta, data.image_lengths()
    shown = Table(title=str(data.folder), show_header=False)
    commit = f" at {meta.commit}" if meta.commit else ""
    shown.add_row("model", f"{meta.model}{commit} ({meta.family}), hidden size {meta.hidden_size}, {meta.dtype}")
    shown.add_row("hidden states", f"stored as {meta.hidden_dtype or meta.dtype}")
    if meta.feature_layers:
        shown.add_row("streams", f"inputs of layers {', '.join(map(str, meta.feature_layers))}, {meta.dtype}")
    shown.add_row("answers", f"the model's own: {meta.regeneration}" if meta.regeneration else "of the data set")
    shown.add_row("samples", f"{meta.samples:,}, {float((images > 0).float().mean()):.0%} with a picture")
    shown.add_row("tokens", f"{meta.tokens:,}, {meta.image_tokens / meta.tokens:.0%} of them image tokens")
    shown.add_row("skipped", ", ".join(f"{count} {reason}" for reason, count in meta.skipped.items()) or "none")
    shown.add_row("disk", f"{format_bytes(meta.bytes)} in {len(meta.shards)} shards")
    shown.add_row("checksums", "all right" if not without else f"{without} not in {INDEX}, the others all right")
    return shown


def decoded(sample: Sample, family: str, model: str) -> Text:
    """A sample's text, with the number of image tokens, and the assistant's tokens in green.

    Raises:
        UserError: the family has no template, or the tokenizer cannot be loaded.
    """
    import torch
    from rich.text import Text

    from eagle.families import family_named

    tokenizer = family_named(family).template_class().load_processor(model).tokenizer
    kinds = torch.where(sample.image_mask, 2, sample.loss_mask.long())
    text = Text()
    for part in torch.tensor_split(torch.arange(len(kinds)), (kinds.diff().nonzero().flatten() + 1).tolist()):
        kind = int(kinds[part[0]])
        if kind == 2:
            text.append(f"[{len(part)} image tokens]", style="cyan")
        else:
            text.append(tokenizer.decode(sample.input_ids[part]), style="green" if kind else "")
    return text


def shown_sample(data: ShardDataset, number: int, model: str | None) -> Text:
    """Sample ``number`` as text, or a hint if the model that the shards name is not here.

    Args:
        model: the base; None for the one that the shards name.

    Raises:
        UserError: no such sample, no template for the family, or no tokenizer in ``model``.
    """
    from rich.text import Text

    from eagle.families import family_named

    meta = data.meta
    family_named(meta.family)
    if not 0 <= number < len(data):
        raise UserError(f"no sample {number}, there are {len(data)}", fix="see --sample")
    if model is not None:
        return decoded(data[number], meta.family, model)
    if "/" not in meta.model and not Path(meta.model).is_dir():
        return Text(ASK)
    try:
        return decoded(data[number], meta.family, meta.model)
    except UserError as error:
        return Text(f"{ASK} ({error})")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = OneLineParser(prog="python -m eagle.ge_data.inspect", description=(__doc__ or "").splitlines()[0])
    made.add_argument("folder", type=Path, help="folder of the shards")
    made.add_argument("--model", help="base model, for the sample's text (default: the one the shards name)")
    made.add_argument("--sample", type=count, default=0, help="number of the sample (default: 0)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parser().parse_args(argv)
    from rich.console import Console
    from rich.text import Text

    from eagle.hidden_states.shards import ShardDataset

    without = check(options.folder, load_index(options.folder))
    data = ShardDataset(options.folder)
    console = Console()
    console.print(table(data, without))
    console.print(Text("tokens a sample\n" + "\n".join(histogram(data.lengths()))))
    console.print(shown_sample(data, options.sample, options.model))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

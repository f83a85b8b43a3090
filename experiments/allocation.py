"""Hidden-state data: batches by length against one conversation a forward, and the disk that a token takes.

    python -m experiments.allocation --json-data-path image.json --image-data-path DIR [--rows 256] [--out FILE.json]

Both ways read the same rows with the same model in one run, in turn, a shard at a time; the first shard of each is not
counted. Bytes are those of the shards, against the hidden state and the text embedding of each token in 16 bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from eagle.hidden_states.index import ShardInfo
from experiments.common import parser, run_record
from llava.errors import UserError, run_cli
from llava.files import write_json

if TYPE_CHECKING:
    from eagle.ge_data.extract import Extractor

ONE, BATCHED = "one at a time", "batches by length"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("experiments.allocation", __doc__)
    add = made.add_argument
    add("--model", default="pocket/llava", help="base model (default: pocket/llava)")
    add("--json-data-path", type=Path, required=True, help="annotation file")
    add("--image-data-path", type=Path, help="folder of the pictures; without it, records without pictures are read")
    add("--rows", type=int, default=256, help="records to read each way, whole shards (default: 256)")
    add("--shard-size", type=int, default=64, help="as in the allocation (default: 64)")
    add("--max-length", type=int, default=2048, help="where conversations are cut (default: 2048)")
    add("--hidden-dtype", choices=("auto", "int8"), default="auto", help="as in the allocation (default: auto)")
    return made.parse_args(argv)


def extractors(options: argparse.Namespace, folder: Path) -> dict[str, Extractor]:
    """The two ways, sharing one model."""
    from eagle.families import load_target, template_of
    from eagle.ge_data.extract import Extractor, source_of
    from eagle.ge_data.selection import IMAGE, TEXT, Selection

    kind = TEXT if options.image_data_path is None else IMAGE
    target = load_target(options.model)
    limit = min(options.max_length, getattr(target.config.get_text_config(), "max_position_embeddings", 2048))
    selection = Selection.of(options.json_data_path, kind, options.image_data_path or Path(), limit, seed=42)
    if len(selection.records) < options.rows or options.rows < 2 * options.shard_size:
        raise UserError(
            f"{len(selection.records)} {kind} rows, {options.rows} asked for, in shards of {options.shard_size}",
            options.json_data_path,
            "give --rows and --shard-size so that there are at least two whole shards",
        )
    source = source_of(target, options.model, None if options.hidden_dtype == "auto" else options.hidden_dtype)
    made = {}
    for way, tokens in ((ONE, 1), (BATCHED, None)):
        place = folder / way.replace(" ", "-")
        place.mkdir()
        made[way] = Extractor(target, template_of(target), selection, place, replace(source), tokens)
    return made


def measure(ways: dict[str, Extractor], rows: int, shard_size: int) -> dict[str, list[tuple[float, ShardInfo]]]:
    """Seconds and contents of each shard, by way."""
    taken: dict[str, list[tuple[float, ShardInfo]]] = {way: [] for way in ways}
    spans = [(start, start + shard_size) for start in range(0, rows - shard_size + 1, shard_size)]
    for span in tqdm(spans, unit="shard"):
        for way, extractor in ways.items():
            began = time.perf_counter()
            (info,) = extractor.run([span], lambda rows, tokens: None)
            taken[way].append((time.perf_counter() - began, info))
    return taken


def report(taken: dict[str, list[tuple[float, ShardInfo]]], hidden_size: int) -> dict[str, Any]:
    """Rates by way, their ratio shard by shard, bytes a token."""
    counted = {way: shards[1:] for way, shards in taken.items()}
    rates = {
        way: {
            "samples_per_second": sum(info.samples for _, info in shards) / sum(seconds for seconds, _ in shards),
            "tokens_per_second": sum(info.tokens for _, info in shards) / sum(seconds for seconds, _ in shards),
        }
        for way, shards in counted.items()
    }
    ratios = [one[0] / both[0] for one, both in zip(counted[ONE], counted[BATCHED], strict=True)]
    shards = [info for _, info in taken[BATCHED]]
    tokens = sum(info.tokens for info in shards)
    size = sum(info.bytes for info in shards) / tokens
    return {
        "rates": rates, "ratio": statistics.median(ratios), "ratios": ratios,
        "samples": sum(info.samples for info in shards), "tokens": tokens,
        "image_tokens": sum(info.image_tokens for info in shards),
        "bytes_per_token": size, "share_of_hidden_and_embedding": size / (4 * hidden_size),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse_args(argv)
    import torch
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as folder:
        ways = extractors(options, Path(folder))
        target = ways[ONE].target
        found = report(measure(ways, options.rows, options.shard_size), target.hidden_size)
    table = Table("way", "samples/s", "tokens/s", title=f"{found['samples']} conversations, {found['tokens']:,} tokens")
    for way, rate in found["rates"].items():
        table.add_row(way, f"{rate['samples_per_second']:.2f}", f"{rate['tokens_per_second']:.0f}")
    console = Console()
    console.print(table)
    console.print(f"{found['ratio']:.2f}x (median of {len(found['ratios'])} shards)")
    share = f"{100 * found['share_of_hidden_and_embedding']:.1f} % of hidden state and embedding in 16 bit"
    console.print(f"{found['bytes_per_token']:.1f} bytes a token, {share}")
    if options.out is not None:
        write_json(options.out, {**run_record(options, torch.device(target.device)), **found})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Time of the draft as image tokens grow, with all of their rows and with pooled ones; random weights.

    python -m experiments.visual_context --out FILE.json
    python -m experiments.visual_context --hidden 3584 --intermediate 18944 --heads 28 --kv-heads 4 --dtype bfloat16
    python -m experiments.visual_context --draft pocket/llava-msd

Nothing is trained here: only the time counts. "Prefill" is the draft's reading of a prompt whose target states are
there already; "cycle" is what one cycle of decoding takes after it: four accepted rows and a tree's levels. Both are
medians, the settings interleaved. The target's own time is not in it; it reads all image tokens in any case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from eagle.arguments import positive
from eagle.decode.drafter import Drafter
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.compression import Compression
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families.base import Prefill
from eagle.provenance import hardware, versions
from eagle.weight_layout import to_input_major_layout
from llava.errors import run_cli
from llava.files import atomic_write

TEXT = 32
"""Text tokens of the prompt before the picture, and again after it."""
ACCEPTED = 4
"""Rows that a cycle makes certain."""


def build(options: argparse.Namespace) -> tuple[DraftModel, nn.Linear]:
    """The draft, random or from a folder, and a random ``lm_head`` for it."""
    dtype = getattr(torch, options.dtype)
    if options.draft:
        draft = load_draft(options.draft, dtype=dtype, device=options.device)
    else:
        config = DraftConfig(
            model_type="llava", hidden_size=options.hidden, intermediate_size=options.intermediate,
            num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, vocab_size=options.vocabulary,
            head_dim=options.hidden // options.heads,
        )  # fmt: skip
        with torch.device(options.device):
            draft = DraftModel(config).to(dtype)
    sizes = (draft.config.hidden_size, draft.config.vocab_size)
    head = nn.Linear(*sizes, bias=False, dtype=dtype, device=options.device)
    to_input_major_layout(head)  # as a target's
    draft.prepare_for_decoding(head)
    return draft, head


def prompt(draft: DraftModel, image_tokens: int) -> tuple[Prefill, torch.Tensor]:
    """Random target states of a prompt with one picture, and its ids [1, S]."""
    length, size, place = image_tokens + 2 * TEXT, draft.config.hidden_size, draft.device
    image = torch.zeros(1, length, dtype=torch.bool, device=place)
    image[:, TEXT : TEXT + image_tokens] = True
    hidden, embeds = (torch.randn(1, length, size, dtype=draft.dtype, device=place) for _ in range(2))
    positions = torch.arange(length, device=place)[None]
    ids = torch.ones(1, length, dtype=torch.long, device=place)
    return Prefill(hidden, embeds, image, positions, positions[:, -1] + 1), ids


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@torch.inference_mode()
def seconds(
    draft: DraftModel, head: nn.Linear, tree: TreeConfig, image_tokens: int, ways: list[Compression], rounds: int
) -> list[tuple[float, float]]:
    """Median seconds of (prefill, cycle) for each way, all on the same prompt."""
    prefill, ids = prompt(draft, image_tokens)
    rows = prefill.hidden[0, :ACCEPTED], ids[0, :ACCEPTED]
    taken: list[list[tuple[float, float]]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, times in zip(ways, taken, strict=True):
            drafter = Drafter(draft, head, ids.shape[1] + 2 * ACCEPTED, tree, compression=way)
            start = time.perf_counter()
            drafter.start(0, prefill, ids, ids[0, :1])
            wait(draft.device)
            middle = time.perf_counter()
            drafter.extend([rows[0]], [rows[1]])
            drafter.expand(tree)
            wait(draft.device)
            if number:  # the first round is a warm-up
                times.append((middle - start, time.perf_counter() - middle))
    return [(statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)) for times in taken]


def measure(options: argparse.Namespace) -> tuple[DraftModel, list[dict[str, Any]]]:
    """One record for each number of image tokens and each way."""
    draft, head = build(options)
    tree = TreeConfig.for_device(draft.device)
    ways = [Compression(), *(Compression(keep) for keep in options.keep)]

    def records() -> Iterator[dict[str, Any]]:
        for image_tokens in options.image_tokens:
            results = seconds(draft, head, tree, image_tokens, ways, options.rounds)
            for way, (prefill, cycle) in zip(ways, results, strict=True):
                kept = image_tokens if way.tokens is None else min(way.tokens, image_tokens)
                yield {"image_tokens": image_tokens, "asked": "all" if way.tokens is None else way.tokens,
                       "kept": kept, "prefill_ms": 1000 * prefill, "cycle_ms": 1000 * cycle}  # fmt: skip

    return draft, list(records())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--draft", help="a draft, folder or hub name, in place of a random one")
    add("--hidden", type=positive, default=256)
    add("--intermediate", type=positive, default=640)
    add("--heads", type=positive, default=4)
    add("--kv-heads", type=positive, default=4)
    add("--vocabulary", type=positive, default=2048)
    add("--image-tokens", type=positive, nargs="+", default=[64, 256, 576, 1024, 2048, 4096, 8000])
    add("--keep", type=int, nargs="+", default=[0, 32], help="rows kept of the picture, besides all (default: 0 32)")
    add("--rounds", type=positive, default=7)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--device", default="cpu")
    add("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def main() -> None:
    """Prints a table; writes JSON if asked."""
    options = parse()
    draft, records = measure(options)
    table = Table("image tokens", "rows in the draft", "prefill ms", "cycle ms", title="draft alone, one picture")
    for record in records:
        table.add_row(
            f"{record['image_tokens']:,}", f"{record['kept']:,}" + (" (all)" if record["asked"] == "all" else ""),
            f"{record['prefill_ms']:.2f}", f"{record['cycle_ms']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if options.out:
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        report = {
            "records": records, "settings": asked, "tree": vars(TreeConfig.for_device(draft.device)),
            "hardware": hardware(draft.device), "versions": versions(),
        }  # fmt: skip
        with atomic_write(options.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_cli(main))

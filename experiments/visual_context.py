"""Time of the draft as image tokens grow, with all of their rows and with pooled ones.

    python -m experiments.visual_context --out FILE.json
    python -m experiments.visual_context --draft pocket/qwen2vl-msd

Only time is measured, on random hidden states. "Prefill" is the draft's pass over a prompt whose hidden states are
there already; "cycle" is the draft's part of one decoding cycle after it: four accepted rows and the levels of a tree.
Both are medians, the settings interleaved. The target's own time is not included; it reads all image tokens anyway.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from eagle.arguments import positive
from experiments.common import parser, run_record
from llava.errors import run_cli
from llava.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from eagle.decode.tree_config import TreeConfig
    from eagle.drafts.compression import Compression
    from eagle.drafts.msd import DraftModel
    from eagle.families.base import Prefill

TEXT = 32
"""Text tokens of the prompt before the picture, and again after it."""
ACCEPTED = 4
"""Tokens that a cycle accepts."""


def build(options: argparse.Namespace) -> tuple[DraftModel, nn.Linear]:
    """The draft, and a random ``lm_head`` for it."""
    import torch
    from torch import nn

    from eagle.drafts.checkpoint import load_msd_draft
    from eagle.weight_layout import to_input_major_layout

    dtype = getattr(torch, options.dtype)
    draft = load_msd_draft(options.draft, "the study", dtype=dtype, device=options.device)
    sizes = (draft.config.hidden_size, draft.config.vocab_size)
    head = nn.Linear(*sizes, bias=False, dtype=dtype, device=options.device)
    to_input_major_layout(head)  # as a target's
    draft.prepare_for_decoding(head)
    return draft, head


def prompt(draft: DraftModel, image_tokens: int) -> tuple[Prefill, torch.Tensor]:
    """Random target states of a prompt with one picture, and its ids [1, S]."""
    import torch

    from eagle.families.base import Prefill

    length, size, place = image_tokens + 2 * TEXT, draft.config.hidden_size, draft.device
    image = torch.zeros(1, length, dtype=torch.bool, device=place)
    image[:, TEXT : TEXT + image_tokens] = True
    hidden, embeds = (torch.randn(1, length, size, dtype=draft.dtype, device=place) for _ in range(2))
    positions = torch.arange(length, device=place)[None]
    ids = torch.ones(1, length, dtype=torch.long, device=place)
    return Prefill(hidden, embeds, image, positions, positions[:, -1] + 1), ids


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(
    draft: DraftModel, head: nn.Linear, tree: TreeConfig, image_tokens: int, ways: list[Compression], rounds: int
) -> list[tuple[float, float]]:
    """Median seconds of (prefill, cycle) for each way, all on the same prompt."""
    from eagle.decode.drafter import Drafter

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
    from eagle.decode.tree_config import TreeConfig
    from eagle.drafts.compression import Compression

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


def parse_args() -> argparse.Namespace:
    made = parser("experiments.visual_context", __doc__)
    add = made.add_argument
    add("--draft", default="pocket/llava-msd", help="draft, folder or hub name (default: pocket/llava-msd)")
    add("--image-tokens", type=positive, nargs="+", default=[64, 256, 576, 1024, 2048, 4096, 8000])
    add("--keep", type=int, nargs="+", default=[0, 32], help="image rows kept, besides all (default: 0 32)")
    add("--rounds", type=positive, default=7)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--device", default="cpu")
    return made.parse_args()


def main() -> None:
    """Prints a table; writes JSON if asked."""
    options = parse_args()
    import torch
    from rich.console import Console
    from rich.table import Table

    from eagle.decode.tree_config import TreeConfig

    with torch.inference_mode():
        draft, records = measure(options)
    table = Table("image tokens", "rows in the draft", "prefill ms", "cycle ms", title="draft alone, one picture")
    for record in records:
        table.add_row(
            f"{record['image_tokens']:,}", f"{record['kept']:,}" + (" (all)" if record["asked"] == "all" else ""),
            f"{record['prefill_ms']:.2f}", f"{record['cycle_ms']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if options.out:
        tree = vars(TreeConfig.for_device(draft.device))
        write_json(options.out, {**run_record(options, draft.device), "records": records, "tree": tree})


if __name__ == "__main__":
    sys.exit(run_cli(main))

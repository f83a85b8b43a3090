"""Verification of a draft tree after long contexts: masked attention against attention in two parts.

    python -m experiments.tree_attention [--heads 28 --key-heads 4] [--contexts 700,2048,4096,8192] [--out FILE.json]

A random text model of Qwen2's kind; cached rows are random too, since times do not depend on them. Both ways take turns
in one run, so a busy moment of the machine slows both. Times are medians of one forward over the tree's nodes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

from experiments.common import parser, run_record
from llava.errors import run_cli
from llava.files import write_json


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("experiments.tree_attention", __doc__)
    add = made.add_argument
    add("--heads", type=int, default=28, help="heads (default: 28)")
    add("--key-heads", type=int, default=4, help="heads of keys and values (default: 4)")
    add("--head-dim", type=int, default=64, help="size of a head (default: 64)")
    add("--layers", type=int, default=4, help="layers (default: 4)")
    add("--nodes", type=int, default=60, help="nodes of the tree (default: 60)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default: float32)")
    add("--device", default="cpu", help="(default: cpu)")
    add("--rounds", type=int, default=7, help="timed forwards of each way (default: 7)")
    add("--contexts", default="700,2048,4096,8192", help="cached positions (default: 700,2048,4096,8192)")
    return made.parse_args(argv)


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each context."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    from eagle.attention import TwoParts, with_tree_attention
    from eagle.decode.adaptive.cost import seconds_of
    from eagle.decode.masks import MaskBuffer
    from eagle.kv_cache import KVCache

    device, dtype, nodes = torch.device(options.device), getattr(torch, options.dtype), options.nodes
    width = options.heads * options.head_dim
    config = Qwen2Config(
        hidden_size=width, num_attention_heads=options.heads, num_key_value_heads=options.key_heads,
        num_hidden_layers=options.layers, intermediate_size=3 * width, vocab_size=1000,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = Qwen2Model(config).to(device, dtype).eval()
    shapes = [(options.key_heads, options.head_dim)] * options.layers
    block = torch.eye(nodes, device=device).bool() | (torch.arange(nodes, device=device) == 0)  # a star
    cache_argument = "cache" if "cache" in signature(Qwen2Model.forward).parameters else "past_key_values"
    ids, rows = torch.zeros(1, nodes, dtype=torch.long, device=device), []
    for context in map(int, options.contexts.split(",")):
        cache = KVCache.allocate([device] * options.layers, 1, shapes, context + nodes, dtype)
        for layer in cache.layers:
            layer.store_k.normal_()
            layer.store_v.normal_()
        mask = MaskBuffer(nodes, context + nodes, dtype, device).window([context], block[None])
        places = torch.full_like(ids, context + 1)

        given = {"attention_mask": mask, "position_ids": places, "use_cache": True, cache_argument: cache}

        def masked(given: dict[str, Any] = given, cache: KVCache = cache, context: int = context) -> torch.Tensor:
            cache.truncate([context])
            return model(ids, **given).last_hidden_state.cpu()

        def two_part(given: dict[str, Any], forward: Callable[..., torch.Tensor] = masked) -> torch.Tensor:
            with with_tree_attention(config):
                return forward(given)

        asked = {**given, "two_parts": TwoParts(mask, context)}
        ways: dict[str, Callable[[], torch.Tensor]] = {"masked": masked, "two_part": partial(two_part, asked)}
        with torch.inference_mode():
            whole, parts = (way() for way in ways.values())
            times = seconds_of(list(ways.values()), options.rounds)
        row = {"context": context, **{name: round(1e3 * each, 1) for name, each in zip(ways, times, strict=True)}}
        rows.append({**row, "largest_difference": float((whole - parts).abs().max())})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parse_args(argv)
    rows = measured(options)
    for row in rows:
        faster = row["masked"] / row["two_part"]
        print(f"{row['context']:>6}: masked {row['masked']} ms, two parts {row['two_part']} ms, {faster:.2f}x")
    if options.out is not None:
        write_json(options.out, {"run": run_record(options), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Time of a draft step with the whole vocabulary and with a trimmed one, at the real size, on random weights.

    python benchmarks/draft_head.py --hidden 3584 --vocabulary 152064 --keep 32000

Nothing is trained here: only the time counts. The draft layer has the shape of MSD-Qwen2VL-7B-Instruct's by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from eagle.hardware import hardware
from eagle.model.config import DraftConfig
from eagle.model.draft import DraftModel
from llava.files import atomic_write


def build(options: argparse.Namespace, dtype: torch.dtype) -> tuple[DraftModel, nn.Linear]:
    """A draft and a head of the asked size, small random weights."""
    config = DraftConfig(
        model_type="qwen2_vl", hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, vocab_size=options.vocabulary,
        head_dim=options.hidden // options.heads, input_layernorm=True, attention_bias=True,
    )  # fmt: skip
    with torch.device(options.device):
        draft, head = (
            DraftModel(config).to(dtype),
            nn.Linear(options.hidden, options.vocabulary, bias=False, dtype=dtype),
        )
    draft.head_tokens = torch.randperm(options.vocabulary)[: options.keep].sort().values
    return draft, head


@torch.inference_mode()
def seconds_of_step(draft: DraftModel, head: nn.Linear, width: int, rounds: int) -> float:
    """Median time from ``width`` frontier nodes to their likely children."""
    hidden = torch.randn(1, width, draft.config.hidden_size, dtype=draft.dtype, device=draft.device)
    tokens = torch.zeros(1, width, dtype=torch.long, device=draft.device)
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        rows = draft.fuse(hidden, draft.embed_tokens(tokens))
        draft.likely_next(draft(rows, torch.zeros_like(tokens)), width, head)[0].cpu()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hidden", type=int, default=3584)
    add("--intermediate", type=int, default=18944)
    add("--heads", type=int, default=28)
    add("--kv-heads", type=int, default=4)
    add("--vocabulary", type=int, default=152064)
    add("--keep", type=int, default=32000)
    add("--width", type=int, default=10, help="frontier nodes of a step")
    add("--rounds", type=int, default=7)
    add("--dtype", default="bfloat16")
    add("--device", default="cpu")
    add("--out", type=Path)
    options = parser.parse_args()
    draft, head = build(options, getattr(torch, options.dtype))
    whole = seconds_of_step(draft, head, options.width, options.rounds)
    draft.prepare_for_decoding(head)
    trimmed = seconds_of_step(draft, head, options.width, options.rounds)
    table = Table("head", "tokens", "ms a step", title=f"draft step, {options.width} nodes, {options.dtype}")
    table.add_row("whole", f"{options.vocabulary:,}", f"{1000 * whole:.1f}")
    table.add_row("trimmed", f"{options.keep:,}", f"{1000 * trimmed:.1f}")
    Console().print(table)
    Console().print(f"{whole / trimmed:.2f}x")
    if options.out:
        asked = {name: value for name, value in vars(options).items() if name != "out"}
        report = {"whole": whole, "trimmed": trimmed, "settings": asked, "hardware": hardware(draft.device)}
        with atomic_write(options.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time of a draft step with the whole vocabulary and with a trimmed one, at the real size, on random weights.

    python -m experiments.draft_head --out FILE.json

Nothing is trained here: only the time counts. By default sizes are those of MSD-Qwen2VL-7B-Instruct (H 3584, V 152064),
which takes about 5 GiB in bfloat16. Both heads are timed in turn, round by round, on the same draft.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.provenance import hardware, versions
from eagle.weight_layout import to_input_major_layout
from llava.errors import UserError, run_cli
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
    to_input_major_layout(head)  # as a target's
    return draft.prepare_for_decoding(head), head


@torch.inference_mode()
def seconds_of_step(draft: DraftModel, head: nn.Linear, width: int, rounds: int) -> tuple[float, float]:
    """Median time from ``width`` frontier nodes to their likely children, with the whole head and the trimmed one."""
    hidden = torch.randn(1, width, draft.config.hidden_size, dtype=draft.dtype, device=draft.device)
    tokens = torch.zeros(1, width, dtype=torch.long, device=draft.device)
    kept = draft.head_tokens
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for draft.head_tokens, times in zip((None, kept), taken, strict=True):
            start = time.perf_counter()
            rows = draft.fuse(hidden, draft.embed_tokens(tokens))
            draft.likely_next(draft(rows, torch.zeros_like(tokens)), width, head)[0].cpu()
            times.append(time.perf_counter() - start)
    return statistics.median(taken[0][1:]), statistics.median(taken[1][1:])


def main() -> None:
    """Prints a table; writes JSON if asked."""
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
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    add("--device", default="cpu")
    add("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.keep > options.vocabulary:
        raise UserError(f"--keep {options.keep} of a vocabulary of {options.vocabulary}", fix="keep fewer tokens")
    draft, head = build(options, getattr(torch, options.dtype))
    whole, trimmed = seconds_of_step(draft, head, options.width, options.rounds)
    table = Table("head", "tokens", "ms a step", title=f"draft step, {options.width} nodes, {options.dtype}")
    table.add_row("whole", f"{options.vocabulary:,}", f"{1000 * whole:.1f}")
    table.add_row("trimmed", f"{options.keep:,}", f"{1000 * trimmed:.1f}")
    Console().print(table)
    Console().print(f"{whole / trimmed:.2f}x")
    if options.out:
        asked = {name: value for name, value in vars(options).items() if name != "out"}
        report = {
            "whole_seconds": whole, "trimmed_seconds": trimmed, "speedup": whole / trimmed, "settings": asked,
            "hardware": hardware(draft.device), "versions": versions(),
        }  # fmt: skip
        with atomic_write(options.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_cli(main))

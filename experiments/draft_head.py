"""Time of one draft step with the whole vocabulary and with a trimmed one, on random weights.

    python -m experiments.draft_head --out FILE.json

By default the sizes are those of MSD-Qwen2VL-7B-Instruct (hidden size 3584, vocabulary 152064), which need about 5 GiB
in bfloat16. Both heads are timed in turn, round by round, on the same draft.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from experiments.common import parser, run_record
from llava.errors import UserError, run_cli
from llava.files import write_json

if TYPE_CHECKING:
    from torch import nn

    from eagle.drafts.msd import DraftModel

HEAD_DIM, GROUP, FEED_FORWARD = 128, 7, 18944 / 3584  # of Qwen2-VL-7B: sizes that follow from the hidden size
WIDTH = 10  # frontier nodes of a step
ROUNDS = 7


def build(options: argparse.Namespace) -> tuple[DraftModel, nn.Linear]:
    """A draft and an ``lm_head`` of the given size with small random weights."""
    import torch
    from torch import nn

    from eagle.drafts.config import DraftConfig
    from eagle.drafts.msd import DraftModel
    from eagle.weight_layout import to_input_major_layout

    heads, dtype = max(1, options.hidden // HEAD_DIM), getattr(torch, options.dtype)
    config = DraftConfig(
        model_type="qwen2_vl", hidden_size=options.hidden, intermediate_size=round(options.hidden * FEED_FORWARD),
        num_attention_heads=heads, num_key_value_heads=max(1, heads // GROUP), vocab_size=options.vocabulary,
        head_dim=options.hidden // heads, input_layernorm=True, attention_bias=True,
    )  # fmt: skip
    with torch.device(options.device):
        draft = DraftModel(config).to(dtype)
        head = nn.Linear(options.hidden, options.vocabulary, bias=False, dtype=dtype)
    draft.draft_vocab = torch.randperm(options.vocabulary)[: options.keep].sort().values
    to_input_major_layout(head)  # as a target's
    return draft.prepare_for_decoding(head), head


def seconds_of_step(draft: DraftModel, head: nn.Linear) -> tuple[float, float]:
    """Median time from `WIDTH` frontier nodes to their likely children, with the whole head and the trimmed one."""
    import torch

    from eagle.decode.adaptive.cost import seconds_of

    hidden = torch.randn(1, WIDTH, draft.config.hidden_size, dtype=draft.dtype, device=draft.device)
    tokens = torch.zeros(1, WIDTH, dtype=torch.long, device=draft.device)
    kept = draft.draft_vocab

    def step(vocabulary: torch.Tensor | None) -> None:
        draft.draft_vocab = vocabulary
        rows = draft.fuse(hidden, draft.embed_tokens(tokens))
        draft.likely_next(draft(rows, torch.zeros_like(tokens)), WIDTH, head)[0].cpu()

    whole, trimmed = seconds_of([partial(step, None), partial(step, kept)], ROUNDS)
    return whole, trimmed


def main() -> None:
    """Prints a table; writes JSON if asked."""
    made = parser("experiments.draft_head", __doc__)
    add = made.add_argument
    add("--hidden", type=int, default=3584, help="hidden size (default %(default)s)")
    add("--vocabulary", type=int, default=152064, help="tokens of the target (default %(default)s)")
    add("--keep", type=int, default=32000, help="tokens of the trimmed head (default %(default)s)")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    add("--device", default="cpu")
    options = made.parse_args()
    import torch
    from rich.console import Console
    from rich.table import Table

    if options.keep > options.vocabulary:
        raise UserError(f"--keep {options.keep} of a vocabulary of {options.vocabulary}", fix="keep fewer tokens")
    draft, head = build(options)
    with torch.inference_mode():
        whole, trimmed = seconds_of_step(draft, head)
    table = Table("head", "tokens", "ms per step", title=f"draft step, {WIDTH} nodes, {options.dtype}")
    table.add_row("whole", f"{options.vocabulary:,}", f"{1000 * whole:.1f}")
    table.add_row("trimmed", f"{options.keep:,}", f"{1000 * trimmed:.1f}")
    Console().print(table)
    Console().print(f"{whole / trimmed:.2f}x")
    if options.out:
        record = run_record(options, draft.device)
        times = {"whole_seconds": whole, "trimmed_seconds": trimmed, "speedup": whole / trimmed}
        write_json(options.out, {**record, **times})


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""How two answers are compared."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from eagle.exactness import logit_gap


def test_the_gap_of_two_logits_is_counted_in_steps() -> None:
    """Worked: between 8 and 16 a step of bfloat16 is 1/16."""
    row = torch.zeros(1, 5)
    row[0, 2], row[0, 3] = 9.0, 8.875
    target = SimpleNamespace(
        prefill=lambda inputs: SimpleNamespace(hidden=torch.zeros(1, inputs["input_ids"].shape[1], 4)),
        head=lambda hidden: row.bfloat16(),
    )
    ids = torch.tensor([7, 1, 2, 4])
    gap = logit_gap(target, {"input_ids": ids[None, :2]}, ids, 2, 3)  # type: ignore[arg-type]
    assert gap == (2, 3, (9.0, 8.875), 2.0)

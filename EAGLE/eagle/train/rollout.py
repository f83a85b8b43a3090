"""The draft fed on its own outputs, at every position of a sample at once, as decoding feeds it.

Step k = 1 reads the target's features. At step k row t reads its own prediction of step k-1 in place of those of
``x_{t+k-1}``, the token ``x_{t+k}``, and sits at position t+k-1; it predicts ``h_{t+k}``. It attends to the true rows
0..t and to the rows drafted after them from the same root, which are row t of the steps 2..k: one causal block, then
diagonals.

Four rows at step 3 (columns: true rows | step 2 | step 3)::

    1 . . . | 1 . . . | 1 . . .
    1 1 . . | . 1 . . | . 1 . .
    1 1 1 . | . . 1 . | . . 1 .
    1 1 1 1 | . . . 1 | . . . 1
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle.drafts.head import TrainedHead


class GrowingCache:
    """Keys and values of all steps so far, with gradient; the interface of `KVCache.update`."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # by layer

    def update(self, key: Tensor, value: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, R, head_dim]; returns all rows."""
        if layer in self.rows:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.rows[layer], (key, value), strict=True))
        self.rows[layer] = (key, value)
        return self.rows[layer]


def rollout_mask(rows: int, step: int, device: torch.device | str = "cpu", window: int | None = None) -> Tensor:
    """[1, 1, R, step * R] bool, true where a row may look; see the picture above.

    Args:
        window: rows that a row sees, itself included. None sees all.
    """
    causal = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    own = torch.eye(rows, dtype=torch.bool, device=device)
    if window is None:
        return torch.cat([causal, *[own] * (step - 1)], dim=1)[None, None]
    seen = causal.triu(step - window)  # row t stands at place t + step - 1
    return torch.cat([seen, *[own & (step - earlier < window) for earlier in range(2, step + 1)]], dim=1)[None, None]


def shift_left(x: Tensor, steps: int, rows: int) -> Tensor:
    """Row t of the result is row ``t + steps`` of ``x`` [B, S, ...]; ``rows`` rows, zeros past the end.

    >>> shift_left(torch.tensor([[1, 2, 3, 4]]), 2, 3).tolist()
    [[3, 4, 0]]
    """
    part = x[:, steps : steps + rows]
    padding = [0, 0] * (x.dim() - 2) + [0, rows - part.shape[1]]
    return F.pad(part, padding)


def shift_positions_left(positions: Tensor, steps: int, rows: int) -> Tensor:
    """Position ids [3, B, R] of the rows that are ``steps`` behind each token of ``positions`` [3, B, S]: what
    decoding gives them where text follows."""
    return torch.stack([shift_left(row, steps, rows) for row in positions])


def rollout_loss_mask(loss_mask: Tensor, step: int) -> Tensor:
    """Rows [B, R] that count at ``step``: row t drafts ``x_{t+2}..x_{t+step+1}``, all within one answer.

    >>> rollout_loss_mask(torch.tensor([[False, True, True, True, False]]), 2).int().tolist()
    [[0, 1, 1, 0, 0]]
    """
    result = loss_mask
    for later in range(1, step):
        result = result & shift_left(loss_mask, later, loss_mask.shape[1])
    return result


def predict_steps(
    draft: TrainedHead,
    inputs: Tensor,
    embeds: Tensor,
    image_mask: Tensor,
    steps: int,
    positions: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (k, predicted [B, S-1, H]) for k = 1..steps; row t of ``predicted`` is the prediction of ``h_{t+k}``.

    Args:
        inputs: [B, S, F] the target's features, for an MSD draft its hidden states (with noise in training).
        embeds: [B, S, H] embeddings of ``x_0..x_{S-1}``, image features at image tokens if the draft reads them;
            ``image_mask`` [B, S].
        positions: [3, B, S] M-RoPE positions of ``x_0..x_{S-1}``; None is plain numbers from 0.
    """
    rows = inputs.shape[1] - 1
    cache: Any = GrowingCache() if steps > 1 else None
    hidden = draft.condense(inputs[:, :rows])
    plain = torch.arange(rows, device=inputs.device).unsqueeze(0)  # [1, R]
    for step in range(1, steps + 1):
        x = draft.fuse(hidden, shift_left(embeds, step, rows), shift_left(image_mask, step, rows))  # [B, R, H]
        causal = step == 1 and draft.window is None
        mask = None if causal else rollout_mask(rows, step, inputs.device, draft.window)
        position_ids = plain + (step - 1) if positions is None else shift_positions_left(positions, step - 1, rows)
        hidden = draft(x, position_ids, mask, cache)
        yield step, hidden

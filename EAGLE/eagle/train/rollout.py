"""The draft fed on its own outputs, from every position of an answer at once, as decoding feeds it.

Step k = 1 reads the target's features, in all rows of a sample. At step k row t reads its own prediction of step k-1 in
place of those of ``x_{t+k-1}``, the token ``x_{t+k}``, and sits at position t+k-1; it predicts ``h_{t+k}``. It attends
to the true rows 0..t and to the rows drafted after them from the same root, which are row t of the steps 2..k. It sees
no other row's drafts, so only rows that count are computed; of the others, the keys and values of step 1.

Rows 1 and 3 of four, at step 3 (columns: true rows | step 2 | step 3)::

    1 1 . . | 1 . | 1 .
    1 1 1 1 | . 1 | . 1
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle.drafts.head import TrainedHead
from eagle.drafts.modules import take


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


def rollout_mask(rows: Tensor, true: int, step: int, window: int | None = None) -> Tensor:
    """[B, 1, R, true + (step - 1) * R] bool, true where a row may look; see the picture above.

    Args:
        rows: [B, R] the numbers of the rows.
        true: number of true rows T.
        window: rows that a row sees, itself included. None sees all.
    """
    columns, last = torch.arange(true, device=rows.device), rows.unsqueeze(-1)  # [T], [B, R, 1]
    seen = columns <= last  # [B, R, T]
    if window is not None:
        seen = seen & (columns > last + step - 1 - window)  # row t stands at place t + step - 1
    own = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
    drafted = [own & (window is None or step - earlier < window) for earlier in range(2, step + 1)]
    return torch.cat([seen, *(each.expand(len(rows), -1, -1) for each in drafted)], dim=-1).unsqueeze(1)


def pack(mask: Tensor) -> Tensor:
    """The numbers [B, R'] of the rows that are true in ``mask`` [B, R], ascending, behind them other rows of a sample
    that has fewer than the batch's largest number R', which is at least 1.

    >>> pack(torch.tensor([[False, True, True], [False, False, True]])).tolist()
    [[1, 2], [2, 0]]
    """
    count = int(mask.sum(dim=1).max())
    return mask.long().sort(dim=1, descending=True, stable=True).indices[:, : max(count, 1)]


def shift_left(x: Tensor, steps: int, rows: int) -> Tensor:
    """Row t of the result is row ``t + steps`` of ``x`` [B, S, ...]; ``rows`` rows, zeros past the end.

    >>> shift_left(torch.tensor([[1, 2, 3, 4]]), 2, 3).tolist()
    [[3, 4, 0]]
    """
    part = x[:, steps : steps + rows]
    padding = [0, 0] * (x.dim() - 2) + [0, rows - part.shape[1]]
    return F.pad(part, padding)


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
    loss_mask: Tensor,
    steps: int,
    positions: Tensor | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (k, counted [B, S-1], predicted [N, H]) for k = 1..steps: the rows that count at step k
    (`rollout_loss_mask`), and what they predict of ``h_{t+k}``, in the order of the mask.

    Args:
        inputs: [B, S, F] the target's features, for an MSD draft its hidden states (with noise in training).
        embeds: [B, S, H] embeddings of ``x_0..x_{S-1}``, image features at image tokens if the draft reads them;
            ``image_mask`` [B, S].
        loss_mask: [B, S-1] rows that decoding drafts from.
        positions: [3, B, S] M-RoPE positions of ``x_0..x_{S-1}``; None is plain numbers from 0.
    """
    true = inputs.shape[1] - 1
    cache: Any = GrowingCache() if steps > 1 else None
    x = draft.fuse(draft.condense(inputs[:, :true]), embeds[:, 1:], image_mask[:, 1:])  # [B, S-1, X]
    plain = torch.arange(true, device=inputs.device).unsqueeze(0)  # [1, S-1]
    mask = None if draft.window is None else rollout_mask(plain, true, 1, draft.window)
    rows = pack(loss_mask)  # [B, R]
    hidden = draft.forward_rows(x, places_of(positions, plain), mask, cache, rows)  # [B, R, H]
    yield 1, loss_mask, hidden[take(loss_mask, rows)]
    if steps == 1:
        return
    later = pack(take(rollout_loss_mask(loss_mask, 2), rows))  # of the rows, those of the further steps
    rows, hidden = take(rows, later), take(hidden, later)
    for step in range(2, steps + 1):
        x = draft.fuse(hidden, take(embeds, rows + step), take(image_mask, rows + step))  # [B, R, X]
        mask = rollout_mask(rows, true, step, draft.window)
        hidden = draft(x, places_of(positions, rows + (step - 1)), mask, cache)
        counted = rollout_loss_mask(loss_mask, step)
        yield step, counted, hidden[take(counted, rows)]


def places_of(positions: Tensor | None, numbers: Tensor) -> Tensor:
    """Position ids of rows with plain ``numbers`` [B or 1, R]: the same, or of M-RoPE ``positions`` [3, B, S] those
    that decoding gives them where text follows, [3, B, R]."""
    if positions is None:
        return numbers
    return torch.stack([take(each, numbers.expand(len(each), -1)) for each in positions])

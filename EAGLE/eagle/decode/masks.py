"""Additive attention masks of tree forwards.

They are additive and finite (`finfo.min`). This is correct for sdpa and for eager attention; eager attention would
misread a bool mask, and minus infinity would give NaN rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 16
"""Rows of a mask start at multiples of this many columns, so kernels that need aligned rows do not copy them."""


class MaskBuffer:
    """Masks of up to ``rows`` query rows over up to ``capacity`` cached rows.

    For one sequence they are views of one preallocated buffer: all rows of a tree see the whole past, so only a small
    block changes from one forward to the next. A batch gets a new mask.
    """

    def __init__(self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        wide = -(-capacity // ALIGNED) * ALIGNED
        self._buffer = torch.zeros(rows, wide, dtype=dtype, device=device)
        self._closed = torch.finfo(dtype).min
        self._written = (0, 0)

    def window(self, pasts: Sequence[int], blocks: Tensor) -> Tensor:
        """The mask of ``n`` query rows. All see rows 0..past-1. The block says which of the next ``m`` rows they see.

        Args:
            pasts: cached rows of each sequence that its query rows see.
            blocks: [B, n, m] bool, true where a query row attends.

        Returns:
            [B, 1, n, longest past + m] additive mask, valid until the next call.
        """
        if len(pasts) > 1:
            return batch_mask(pasts, blocks, self._buffer.dtype)
        (past,) = pasts
        rows, columns = blocks.shape[1:]
        start, end = self._written
        self._buffer[:, start:end] = 0
        self._buffer[:rows, past : past + columns].masked_fill_(~blocks[0], self._closed)
        self._written = (past, past + columns)
        return self._buffer[None, None, :rows, : past + columns]


def batch_mask(pasts: Sequence[int], blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """`MaskBuffer.window` for sequences of different lengths.

    >>> batch_mask([1, 2], torch.tensor([[[True]], [[True]]]), torch.float32).eq(0).int().tolist()
    [[[[1, 1, 0]]], [[[1, 1, 1]]]]
    """
    return mask_behind(torch.tensor(pasts, device=blocks.device), blocks, max(pasts) + blocks.shape[2], dtype)


def mask_behind(past: Tensor, blocks: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`batch_mask` for cached rows ``past`` [B] that the host does not know, of ``columns`` columns: those behind the
    block are masked."""
    rows, width = blocks.shape[1:]
    place = torch.arange(columns, device=blocks.device) - past.unsqueeze(1)  # [B, T] column relative to the block
    index = place.clamp(0, width - 1).unsqueeze(1).expand(-1, rows, -1)  # [B, n, T]
    place = place.unsqueeze(1)
    open_ = (place < 0) | (blocks.gather(2, index) & (place < width))  # [B, n, T]
    mask = torch.zeros(open_.shape, dtype=dtype, device=blocks.device)
    return mask.masked_fill_(~open_, torch.finfo(dtype).min).unsqueeze(1)

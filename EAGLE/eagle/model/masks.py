"""Additive attention masks of tree forwards, in one preallocated buffer.

All rows of a tree see the whole past, so only a small block changes from one forward to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MaskBuffer:
    """Masks of up to ``rows`` query rows over up to ``capacity`` cached rows.

    Additive and finite (`finfo.min`), since that is right for sdpa and for eager attention, where a bool mask is
    silently wrong and minus infinity gives NaN rows.
    """

    def __init__(self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.zeros(rows, capacity, dtype=dtype, device=device)
        self._closed = torch.finfo(dtype).min
        self._written = (0, 0)

    def window(self, past: int, block: Tensor) -> Tensor:
        """The mask of ``n`` rows which all see rows 0..past-1, and of the ``m`` after them what ``block`` says.

        Args:
            past: cached rows that every query row sees.
            block: [n, m] bool, true where a query row may look.

        Returns:
            [1, 1, n, past + m] additive mask, valid until the next call.
        """
        rows, columns = block.shape
        start, end = self._written
        self._buffer[:, start:end] = 0
        self._buffer[:rows, past : past + columns].masked_fill_(~block, self._closed)
        self._written = (past, past + columns)
        return self._buffer[None, None, :rows, : past + columns]

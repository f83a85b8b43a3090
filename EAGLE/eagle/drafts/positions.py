"""M-RoPE positions of a conversation, from its pictures' grids alone: no model, no ids.

As Qwen2-VL numbers them (arXiv 2409.12191, section 2.1): a text token has the same number in all three rows (time,
height, width); a picture's features share one time, and their row and column count from there; what follows a picture
continues after its longer side.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mrope_positions(image_mask: Tensor, grids: Tensor) -> Tensor:
    """Position numbers of a sequence that starts at 0.

    Args:
        image_mask: [S] bool, true on image tokens.
        grids: [P, 3] frames, rows and columns of each picture's features, in order; their products add up to the image
            tokens.

    Returns:
        [3, S] int64.

    >>> mrope_positions(torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 0]).bool(), torch.tensor([[1, 2, 3]])).tolist()
    [[0, 1, 1, 1, 1, 1, 1, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]]
    """
    places = image_mask.nonzero().flatten().tolist()  # [I]
    parts: list[Tensor] = []
    position, at, used = 0, 0, 0  # next number, next token, image tokens behind us
    for frames, rows, columns in grids.tolist():
        start, count = places[used], frames * rows * columns
        parts.append(_text(start - at) + position)
        position += start - at
        axes = [torch.arange(size) for size in (frames, rows, columns)]
        parts.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + position)  # [3, count]
        position += max(rows, columns)
        at, used = start + count, used + count
    parts.append(_text(image_mask.shape[0] - at) + position)
    return torch.cat(parts, dim=1)


def _text(count: int) -> Tensor:
    return torch.arange(count).expand(3, -1)

"""Work that does not fit into memory is tried again in halves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from llava.errors import OutOfMemory, UserError
from llava.memory import halved_within_memory, within_memory

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    MemoryError(),
    OutOfMemory("out of memory with a single token"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_halves_until_each_part_fits(error: Exception) -> None:
    """Two items fit, the item 7 fits never."""
    tried: list[list[int]] = []

    def double(items: Sequence[int]) -> list[int]:
        tried.append(list(items))
        if len(items) > 2 or 7 in items:
            raise error
        return [2 * item for item in items]

    assert halved_within_memory(double, [1, 2, 3, 7]) == [2, 4, 6, None]
    assert tried == [[1, 2, 3, 7], [1, 2], [3, 7], [3], [7], [7]]
    assert halved_within_memory(double, []) == []


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), UserError("no question"), ValueError()], ids=repr)
def test_other_errors_are_raised(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        within_memory(fail)

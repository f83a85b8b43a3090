"""What running out of memory looks like on each kind of device."""

from __future__ import annotations

import torch

CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch has no class of its own for the CPU's failure


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a tensor found no room, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    )

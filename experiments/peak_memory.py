"""Memory of this process: now, and at its highest."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def resident_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on a GPU, else resident (where /proc does not tell, the highest so far)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _field("VmRSS") or peak_bytes(device)


def reset_peak(device: torch.device) -> None:
    """Starts a new peak on a GPU; a process's resident peak is that of its life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The highest so far. On Linux ``VmHWM`` is preferred to ``ru_maxrss``, in which a process started by a large one
    begins with that one's size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return _field("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _field(name: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is no such file or line."""
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None

"""Progress bars of downloads and checks."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

PATIENCE = 2.0
"""Seconds that a check may take before a bar is shown."""


def progress_bar(label: str, unit: str, total: int | None = None, delay: float = 0.0) -> Any:
    """A bar with rate and time left; where nobody watches it prints seldom.

    Args:
        unit: "B" for bytes, which are shown in thousands, millions and so on.
        delay: seconds before it is shown at all.
    """
    slow = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit == "B", mininterval=slow, smoothing=0.05, delay=delay
    )


def checking(size: int) -> Any:
    """A bar over the ``size`` bytes of shards that are read for their checksums; none where that is soon done."""
    return progress_bar("checksums", "B", size, PATIENCE)

"""Where results are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder ``name`` of this package's cache: in ``MSD_CACHE``, or in the user's cache folder."""
    base = os.environ.get("MSD_CACHE")
    if base:
        return Path(base) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msd" / name

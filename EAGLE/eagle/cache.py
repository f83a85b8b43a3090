"""Where results are kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder ``name`` of this package's cache: in ``MSD_CACHE``, or in the user's cache folder. A user without a
    home folder (a number alone, as in containers) has one in the system's folder of temporary files."""
    if base := os.environ.get("MSD_CACHE"):
        return Path(base) / name
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "msd" / name
    try:
        return Path.home() / ".cache" / "msd" / name
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"msd-{os.getuid()}" / name

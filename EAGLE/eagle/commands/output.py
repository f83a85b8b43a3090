"""Where commands print their tables."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120


def console() -> Console:
    """The terminal, or a file of at least `WIDTH` columns; ``COLUMNS`` makes it wider."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console()
    columns = os.environ.get("COLUMNS", "")
    # with a height too, or rich falls back to 80 columns for TERM=dumb
    return Console(width=max(WIDTH, int(columns)) if columns.isdecimal() else WIDTH, height=25)

"""Multimodal speculative decoding: draft, verify, accept.

The names below load torch and transformers when they are first used, so that `msd doctor` runs where those are broken.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagle.decode.msd import MSDModel, MSDOutput
    from eagle.decode.stats import Stats
    from eagle.decode.tree_config import TreeConfig

__version__ = "0.1.0"

__all__ = ["MSDModel", "MSDOutput", "Stats", "TreeConfig", "__version__"]

_HOMES = {
    "MSDModel": "eagle.decode.msd",
    "MSDOutput": "eagle.decode.msd",
    "Stats": "eagle.decode.stats",
    "TreeConfig": "eagle.decode.tree_config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

"""LLaVA-1.5 checkpoints of both public layouts in the stock transformers model, with processor and conversations.

The names below load torch and transformers when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .checkpoint import load_config, load_model, load_pretrained, load_processor
    from .processor import LlavaProcessor

__version__ = "0.1.0"
__all__ = [
    "LlavaProcessor",
    "UserError",
    "__version__",
    "load_config",
    "load_model",
    "load_pretrained",
    "load_processor",
]

_HOMES = {
    "LlavaProcessor": "llava.processor",
    "load_config": "llava.checkpoint",
    "load_model": "llava.checkpoint",
    "load_pretrained": "llava.checkpoint",
    "load_processor": "llava.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

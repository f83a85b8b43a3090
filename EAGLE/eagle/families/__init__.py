"""Families of base models: adapters for decoding, templates for training, and the registry that lists them.

Importing this package imports neither torch nor transformers. `Target` and `Prefill` are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eagle.families.registry import (
    FAMILIES,
    TRAINING_NAMES,
    Family,
    family_named,
    family_of,
    load_target,
    template_of,
)

if TYPE_CHECKING:
    from eagle.families.base import Prefill, Target

__all__ = [
    "FAMILIES",
    "TRAINING_NAMES",
    "Family",
    "Prefill",
    "Target",
    "family_named",
    "family_of",
    "load_target",
    "template_of",
]


def __getattr__(name: str) -> Any:
    if name not in ("Prefill", "Target"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from eagle.families import base

    return getattr(base, name)

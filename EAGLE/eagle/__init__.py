"""Multimodal speculative decoding: draft, verify, accept."""

from eagle.model.config import TreeConfig
from eagle.model.msd import MSDModel, MSDOutput
from eagle.model.stats import Stats

__version__ = "0.1.0"

__all__ = ["MSDModel", "MSDOutput", "Stats", "TreeConfig", "__version__"]

"""LLaVA-1.5 checkpoints of both public layouts in the stock transformers model, with processor and conversations."""

from .checkpoint import load_config, load_model, load_pretrained, load_processor
from .errors import UserError
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

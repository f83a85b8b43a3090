"""lmms-eval plugin: base models decoded with and without speculative decoding.

lmms-eval finds `manifests` through the entry point group `lmms_eval.models`. Importing this package imports neither
torch nor lmms-eval; the engine is imported when a model is made.
"""

from __future__ import annotations

from typing import Any

from lmms_eval_msd import hook
from lmms_eval_msd.hook import MODELS

__version__ = "0.1.0"
__all__ = ["MODELS", "__version__", "manifests"]


def manifests() -> list[Any]:
    """The models, as lmms-eval's entry point expects them. Also adds our flags and tasks to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    hook.install()
    return [ModelManifest(model_id=name, simple_class_path=path) for name, path in MODELS.items()]

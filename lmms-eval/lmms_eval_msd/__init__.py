"""lmms-eval plugin: `--model llava_msd` and `--model qwen2_vl_msd`, with and without speculative decoding.

lmms-eval finds `manifests` through the entry point group `lmms_eval.models`. Importing this package is cheap; the
engine is imported when one of the models is made.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["MODELS", "__version__", "manifests"]

MODELS = ("llava_msd", "qwen2_vl_msd")
MODEL_CLASS = "lmms_eval_msd.model.MSD"


def manifests() -> list[Any]:
    """The models, as lmms-eval's entry point asks for them. Also adds our flags and tasks to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    from lmms_eval_msd import hook

    hook.install()
    return [ModelManifest(model_id=name, simple_class_path=MODEL_CLASS) for name in MODELS]

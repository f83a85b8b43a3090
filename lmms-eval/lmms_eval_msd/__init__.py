"""lmms-eval plugin: base models decoded with and without speculative decoding.

lmms-eval finds `manifests` through the entry point group `lmms_eval.models`. Importing this package is cheap; the
engine is imported when one of the models is made.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["MODELS", "__version__", "manifests"]

MODELS = {
    "llava_msd": "lmms_eval_msd.model.LlavaMSD",
    "llava_next_msd": "lmms_eval_msd.model.LlavaNextMSD",
    "qwen2_vl_msd": "lmms_eval_msd.model.Qwen2VLMSD",
    "qwen2_5_vl_msd": "lmms_eval_msd.model.Qwen2_5VLMSD",
}
"""Name for `--model` -> class."""


def manifests() -> list[Any]:
    """The models, as lmms-eval's entry point asks for them. Also adds our flags and tasks to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    from lmms_eval_msd import hook

    hook.install()
    return [ModelManifest(model_id=name, simple_class_path=path) for name, path in MODELS.items()]

"""Our models in lmms-eval's registry, whatever other plugins do.

lmms-eval loads its plugins in one go and stops at the first that fails; those after it are left out. Which come first
is up to the environment. `python -m lmms_eval_msd` repairs that.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from loguru import logger

from lmms_eval_msd import MODELS, manifests

GROUP = "lmms_eval.models"


def complete(registry: Any) -> list[str]:
    """Registers our models and those of the other plugins that lmms-eval has left out, and warns of the broken ones.

    Args:
        registry: lmms-eval's `ModelRegistryV2`.

    Returns:
        Names of the broken plugins.
    """
    if all(name in registry.list_canonical_model_ids() for name in MODELS):
        return []
    for manifest in manifests():
        registry.register_manifest(manifest, overwrite=True)
    broken = []
    for point in entry_points(group=GROUP):
        if point.value.partition(":")[0] == manifests.__module__:
            continue
        try:
            payload = point.load()
            payload = payload() if callable(payload) else payload
            for manifest in payload if isinstance(payload, Iterable) else [payload]:
                registry.register_manifest(manifest, overwrite=True)
        except Exception as error:  # whatever a stranger's code raises
            broken.append(_name(point))
            logger.warning(f"plugin {_name(point)} of lmms-eval is broken ({type(error).__name__}: {error})")
    return broken


def _name(point: EntryPoint) -> str:
    owner = f"{point.dist.name} {point.dist.version}, " if point.dist is not None else ""
    return f"'{point.name}' ({owner}{point.value})"

"""lmms-eval's command line with our models and flags, also where another plugin of lmms-eval is broken.

python -m lmms_eval_msd --model llava_msd --model_args pretrained=BASE --use_msd --msd_model_path DRAFT --tasks chartqa

lmms-eval loads its plugins one after the other and stops at the first that fails, so a broken plugin hides those after
it. Here all plugins are loaded and the broken ones are named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from loguru import logger

from llava.arguments import OneLineParser
from llava.errors import run_cli
from lmms_eval_msd import MODELS, hook, manifests

GROUP = "lmms_eval.models"


def main() -> None:
    """The command line."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print_help()
        return
    from lmms_eval import __main__ as evaluation
    from lmms_eval.cli import dispatch
    from lmms_eval.models import MODEL_REGISTRY_V2

    load_plugins(MODEL_REGISTRY_V2)
    hook.extend(evaluation)
    dispatch.main()


def print_help() -> None:
    """Our flags, without lmms-eval, whose imports take seconds."""
    more = "All other options are lmms-eval's: python -m lmms_eval_msd eval --help"
    parser = OneLineParser(prog="python -m lmms_eval_msd", description=(__doc__ or "").splitlines()[0], epilog=more)
    hook.add_flags(parser)
    parser.print_help()


def load_plugins(registry: Any) -> list[str]:
    """Registers our models and those of the other plugins that lmms-eval did not load, and warns of broken plugins.

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
        except Exception as error:  # another package's code may raise anything
            broken.append(_name(point))
            logger.warning(f"plugin {_name(point)} of lmms-eval is broken ({type(error).__name__}: {error})")
    return broken


def _name(point: EntryPoint) -> str:
    owner = f"{point.dist.name} {point.dist.version}, " if point.dist is not None else ""
    return f"'{point.name}' ({owner}{point.value})"


if __name__ == "__main__":
    sys.exit(run_cli(main))

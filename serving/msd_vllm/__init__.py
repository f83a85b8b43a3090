"""MSD draft heads in vLLM.

vLLM loads this package through the entry point ``vllm.general_plugins`` in each of its processes and calls `register`.
The draft itself is in `msd_vllm.model`, which vLLM imports when a draft is served. Importing this package imports
nothing of vLLM.
"""

from __future__ import annotations

__version__ = "0.1.0"
ARCHITECTURE = "EagleMSDForCausalLM"
"""Name of the draft class in an exported draft's config.json. vLLM wants "Eagle" in front of it."""
TESTED = ("0.32.0",)
"""Versions of vLLM that the tests ran with. A later patch release of one of these counts as tested too."""


def is_tested(version: str) -> bool:
    """Whether vLLM ``version`` has the major and minor number of one of `TESTED`.

    >>> is_tested("0.32.1+cpu"), is_tested("0.33.0")
    (True, False)
    """
    return version.split(".")[:2] in [each.split(".")[:2] for each in TESTED]


def untested(version: str) -> str:
    """One line on a version outside the tested range."""
    return f"msd-vllm {__version__} was tested with vLLM {', '.join(TESTED)}, this is {version}"


def register() -> None:
    """Tells vLLM the name of the draft class. It may be called several times."""
    from vllm import __version__ as version
    from vllm.logger import init_logger
    from vllm.model_executor.models import ModelRegistry

    if not is_tested(version):
        init_logger(f"vllm.{__name__}").warning("%s", untested(version))
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")

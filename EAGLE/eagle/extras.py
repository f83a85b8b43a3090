"""Optional packages: what an extra of the distribution installs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from llava.errors import UserError


def require(package: str, extra: str) -> Any:
    """Imports an optional package and returns its module.

    Args:
        extra: name of the extra in EAGLE/pyproject.toml that installs it.

    Raises:
        UserError: it is not installed; the message names the extra.
    """
    if find_spec(package.partition(".")[0]) is None:
        raise UserError(f"{package.partition('.')[0]} is not installed", fix=f"pip install 'msd-eagle[{extra}]'")
    return import_module(package)

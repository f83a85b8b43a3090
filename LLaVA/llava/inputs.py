"""Texts and seeds that a user gives."""

from __future__ import annotations

import argparse
import operator
from pathlib import Path
from typing import Any

from .errors import UserError


def is_unicode(text: str) -> bool:
    """False for a text with half of a character (a lone surrogate), which no tokenizer can read."""
    return text.isascii() or text.encode("utf-8", "ignore").decode() == text


def check_text(text: str, what: str, where: str | Path | None = None) -> None:
    """Raises `UserError` for a text with half of a character: broken JSON, or an argument that is not UTF-8."""
    if not is_unicode(text):
        raise UserError(f"{what} has half of a character (a lone surrogate)", where, "write it in UTF-8")


def checked_seed(seed: Any) -> int:
    """A seed of any integer type as an int.

    Raises:
        UserError: it is not an integer, or outside of what torch takes.
    """
    if isinstance(seed, str | bytes | bool) or not hasattr(seed, "__index__"):
        raise UserError(f"seed {seed!r} is not a whole number", fix="give one from 0 to 2^63 - 1")
    number = operator.index(seed)
    if not 0 <= number < 2**63:
        raise UserError(f"seed {number} is out of range", fix="give one from 0 to 2^63 - 1")
    return number


def seed_option(text: str) -> int:
    """An argparse type: a seed."""
    try:
        return checked_seed(int(text))
    except (ValueError, UserError):
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number from 0 to 2^63 - 1") from None

"""Types of command-line options. Does not import torch or transformers."""

from __future__ import annotations

import argparse
import math

from .errors import UserError


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def temperature(value: str | float) -> float:
    """A sampling temperature, 0 for greedy decoding. Also an argparse type.

    Raises:
        UserError: it is negative or not finite.
        ValueError: it is not a number.
    """
    number = float(value)
    if not 0 <= number < math.inf:
        raise UserError(f"temperature {number}", fix="give 0 for greedy decoding, or a larger number")
    return number

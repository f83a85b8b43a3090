"""The argument parser of all commands, and types of its options. Does not import torch or transformers.

Errors are one line, and long flags may have either spelling.
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from llava.errors import UserError

LARGEST = 2**31 - 1
"""Whole number of an option."""
LOWEST_TEMPERATURE = 1e-6
"""Above 0: logits are divided by it, and float32 must hold the result."""


def whole(text: str, low: int, high: int = LARGEST) -> int:
    """A whole number from ``low`` to ``high``, for types of argparse."""
    try:
        value = int(text)
    except ValueError:  # also of thousands of digits
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not at least {low}")
    if value > high:
        raise argparse.ArgumentTypeError(f"{text[:40]} is above {high}")
    return value


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return whole(text, 1)


def count(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    return whole(text, 0)


def port(text: str) -> int:
    """An argparse type: a port, 0 for any free one."""
    return whole(text, 0, 65535)


def temperature(value: str | float) -> float:
    """A sampling temperature, 0 for greedy decoding. Also an argparse type.

    Raises:
        UserError: it is negative, not finite, or too small to divide by.
        ValueError: it is not a number.
    """
    number = float(value)
    if is_greedy(number) or LOWEST_TEMPERATURE <= number < math.inf:
        return number
    raise UserError(f"temperature {number}", fix=f"give 0 for greedy decoding, or at least {LOWEST_TEMPERATURE}")


def is_greedy(temperature: float) -> bool:
    """Whether a temperature asks for greedy decoding."""
    return temperature == 0


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s: one line, without the usage text.

    Long flags are read with ``-`` and with ``_`` between their words. An unknown flag's error names the nearest known
    one, and comes before those of missing and wrong values. So does the error of an unknown command or choice.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix="see --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        known = [str(each) for each in action.choices or ()]
        if action.choices is None or value in action.choices:
            return
        what = "command" if isinstance(action, argparse._SubParsersAction) else "/".join(action.option_strings)
        near = difflib.get_close_matches(str(value), known, n=1)
        raise UserError(
            f"unknown {what} '{value}'", fix=f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        known = self._option_string_actions
        words = [respelled(word, known, self.allow_abbrev) for word in given[:end]]
        if self._subparsers is None:  # else most flags are those of a subparser
            reject_unknown_flags(words, known, self.allow_abbrev)
        namespace, rest = super().parse_known_args(words + given[end:], namespace)
        if rest:
            reject_unknown_flags(rest, known)
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest


def respelled(word: str, known: Iterable[str], abbreviations: bool = False) -> str:
    """A word of a command line, with a flag's name as in ``known``. Anything else stays as it is.

    >>> respelled("--msd_model=a_b", ["--msd-model"]), respelled("--model-type", ["--model_type"])
    ('--msd-model=a_b', '--model_type')
    """
    name, equals, value = word.partition("=")
    if not name.startswith("--") or name in known:
        return word
    for flag in known:
        start = flag[: len(name)] if abbreviations else flag
        if name.replace("_", "-") == start.replace("_", "-"):
            return f"{start}{equals}{value}"
    return word


def reject_unknown_flags(words: Iterable[str], known: Iterable[str], abbreviations: bool = False) -> None:
    """Raises `UserError` for the first long flag in ``words`` that is not in ``known``; it names the nearest one.

    Args:
        abbreviations: the beginning of a known flag is a flag too.
    """
    spelled: dict[str, str] = {}
    for flag in known:
        if flag.startswith("--"):
            spelled.setdefault(flag.replace("_", "-"), flag)
    for word in words:
        name = word.partition("=")[0]
        plain = name.replace("_", "-")
        if not name.startswith("--") or " " in name or name == "--" or plain in spelled:
            continue
        if abbreviations and any(flag.startswith(plain) for flag in spelled):
            continue
        near = difflib.get_close_matches(plain, spelled, n=1)
        raise UserError(
            f"unknown flag {name}", fix=f"did you mean {spelled[near[0]]}?" if near else "see --help for those known"
        )

"""The checks of `msd doctor`: packages, devices, memory, models, hub, pictures. Weights are loaded on request
only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from llava.errors import UserError


class State(Enum):
    """``PROBLEM``: what was asked about will not work. ``WARNING``: it works only in part. ``OK`` may come with a note
    in the last column."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One finding. ``topic``: what was checked; ``found``: what is there; ``fix``: what to do, or a note."""

    topic: str
    state: State
    found: str
    fix: str = ""


@contextmanager
def problems(checks: list[Check], topic: str) -> Iterator[None]:
    """Adds a `UserError` of the block to ``checks``, in the words of the command that would report it."""
    try:
        yield
    except UserError as error:
        found = error.what if error.where is None else f"{error.what}: {error.where}"
        fix = error.fix or "is the name right? see docs/troubleshooting.md"
        checks.append(Check(topic, State.PROBLEM, " ".join(found.split()), " ".join(fix.split())))

"""The checks of `msd doctor`: packages, devices, memory, models, hub, pictures. No weights of a model are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llava.errors import UserError


class State(Enum):
    """``PROBLEM``: what was asked about will not work. ``WARNING``: it works, but slowly or only in part."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One finding. ``topic``: what was checked; ``found``: what is there; ``fix``: what to do, empty if all is well."""

    topic: str
    state: State
    found: str
    fix: str = ""

    @classmethod
    def of_error(cls, topic: str, error: UserError) -> Check:
        """A problem, in the words of the command that would report it."""
        found = error.what if error.where is None else f"{error.what}: {error.where}"
        fix = error.fix or "docs/troubleshooting.md explains the message"
        return cls(topic, State.PROBLEM, " ".join(found.split()), " ".join(fix.split()))

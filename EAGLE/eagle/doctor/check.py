"""One line of the doctor's table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llava.errors import UserError

LOOK_UP = "docs/troubleshooting.md explains the message"


class State(Enum):
    """``PROBLEM``: what was asked about will not work. ``WARNING``: it works, but slower or with less than it could."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """``topic`` what was looked at; ``found`` what is there; ``mend`` how to put it right, empty where all is well."""

    topic: str
    state: State
    found: str
    mend: str = ""

    @classmethod
    def of_error(cls, topic: str, error: UserError) -> Check:
        """A problem, as the command that hits it would report it."""
        found = error.what if error.where is None else f"{error.what}: {error.where}"
        return cls(topic, State.PROBLEM, " ".join(found.split()), " ".join((error.fix or LOOK_UP).split()))

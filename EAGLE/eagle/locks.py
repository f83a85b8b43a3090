"""One run at a time in one folder."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from llava.errors import UserError

LOCK = ".lock"


def take(folder: Path) -> IO[str]:
    """Makes the folder and holds it for this process, until the file that it returns is closed or the process ends,
    however it ends.

    Raises:
        UserError: another run writes here, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot write here ({error.strerror})", folder, "take another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError("another run is writing to this folder", folder, "wait for it, or take another") from None
    return lock

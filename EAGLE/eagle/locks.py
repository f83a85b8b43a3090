"""One run at a time in one folder."""

from __future__ import annotations

import errno
import fcntl
import warnings
from pathlib import Path
from typing import IO

from llava.errors import UserError

LOCK = ".lock"
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What a lock in other hands gives; anything else is a file system that has none."""


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
    except OSError as error:
        if error.errno in HELD:
            lock.close()
            raise UserError("another run is writing to this folder", folder, "wait for it, or take another") from None
        warnings.warn(
            f"{folder} is on a file system without locks ({error.strerror}): nothing keeps two runs out of it",
            stacklevel=2,
        )
    return lock

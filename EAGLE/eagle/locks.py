"""One run at a time in one folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llava.errors import UserError

LOCK = ".msd.lock"


class FolderLock(FileLock):
    """A class of its own: lmms-eval makes all locks of class `FileLock` in its process reentrant."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it until the block or this process ends, killed or not.

    On a file system without locks it warns, and runs the block without one.

    Raises:
        UserError: another run writes to the folder, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write here ({error.strerror})", folder, "choose another folder") from None
    lock = FolderLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError("another run is writing to this folder", folder, "wait for it, or choose another") from None
    except PermissionError as error:
        raise UserError(f"cannot write here ({error.strerror})", folder, "choose another folder") from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"{folder} is on a file system without locks ({error}): two runs could write to it", stacklevel=3)
    try:
        yield
    finally:
        lock.release()

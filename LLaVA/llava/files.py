"""Reads and writes small files: writing is atomic, and errors of JSON give line and column."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import MAKE_ROOM, UserError, is_full_disk

POINTER = b"version https://git-lfs"


def check_writable(path: str | Path) -> None:
    """Raises `UserError` if no file can be written at a path. Missing parent folders are created. Call it before long
    work whose result goes there."""
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            path.lstat()
        if path.exists() and not path.is_file():
            raise UserError("not a file", path, "name a file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # also names that no file can have
        raise UserError(f"cannot write a file here ({_reason(error)})", path) from None
    if not os.access(path.parent, os.W_OK):
        raise UserError("cannot write a file here", path)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames that file to `path` when the block ends without an exception.

    After an exception (or a kill) `path` is what it was before. Missing parent folders are created. If `path` is a
    link, the file that it names is written. A link into the hub's cache is replaced instead: other snapshots share
    that file.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = _behind_link(Path(path))
    check_writable(path)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write a file here ({error.strerror})", path) from None
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except Exception as error:
        if isinstance(error, UserError) or not is_full_disk(error):
            raise
        raise UserError("no room left to write this file", path, MAKE_ROOM) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which becomes `path` when the block ends without an exception.

    Raises:
        UserError: `path` has files already, or its parent cannot be written.
    """
    path = Path(path)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError("the folder to write to is not empty", path, "name another one, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write a folder here ({_reason(error)})", path) from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_not_pointer(path: Path) -> None:
    """Raises `UserError` if a file is only the pointer that git stores in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError("only a git-lfs pointer, not the file", path, "run `git lfs pull`, or download it again")


def read_object(path: str | Path, what: str = "JSON file") -> dict[str, Any]:
    """As `read_json`, for a file that must be a JSON object; anything else is a `UserError` too."""
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise UserError(f"{what} is not a JSON object", path)
    return content


class DuplicateKey(ValueError):
    """A key of a JSON object has two values."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for `json.loads`. Without it the last of two values of a key is taken.

    Raises:
        DuplicateKey: a key is there twice, with different values.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        for key, value in pairs:
            if repr(value) != repr(made[key]):
                raise DuplicateKey(f"key '{key[:40]}' is there twice")
    return made


def read_json(path: str | Path, what: str = "JSON file") -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        what: what the file is to the user, for the message ("model config", "annotation file").

    Raises:
        UserError: the file is missing, unreadable, not UTF-8, or not JSON; the message has line and column. Or a key
            has two values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} not found", path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text (byte {error.start})", path) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be read ({_reason(error)})", path) from None
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        check_not_pointer(path)
        position = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{what} is not valid JSON ({error.msg}, {position})", path) from None
    except RecursionError:
        raise UserError(f"{what} is nested too deep", path) from None
    except DuplicateKey as error:
        raise UserError(f"{what}: {error}", path, "keep one of its values") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{what} cannot be read ({error})", path) from None


def write_json(path: str | Path, data: Any, indent: int | None = 2) -> None:
    """Writes ``data`` as JSON, atomically.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    write_text(path, json.dumps(data, indent=indent) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, atomically.

    Raises:
        UserError: as `write_json`.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _behind_link(path: Path) -> Path:
    """The file that ``path`` names if it is a link, unless that is a blob of the hub's cache."""
    if not path.is_symlink():
        return path
    real = Path(os.path.realpath(path))
    is_blob = real.parent.name == "blobs" and (real.parents[1] / "snapshots").is_dir()
    return path if is_blob else real


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

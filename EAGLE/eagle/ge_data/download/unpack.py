"""Pictures out of a zip archive into one flat folder: nothing outside it, all or nothing, and only what is missing."""

from __future__ import annotations

import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from eagle.ge_data.download.picture_folder import is_picture, need_space
from eagle.progress_bars import progress_bar
from llava.errors import UserError

UNPACKING = ".unpacking"
ENCRYPTED = 1
"""The bit of a member's flags that says so."""
COPY_BUFFER = 1 << 18


def unpack(archive: Path, folder: Path, label: str) -> int:
    """Puts an archive's pictures into ``folder``, whatever folder they have in the archive; returns their number.

    Pictures of the right size that are there already are kept. The others are first unpacked to a temporary folder,
    which takes the name ``folder``, or whose files are moved in where ``folder`` exists. After a kill the next call
    goes on from there.

    Raises:
        UserError: the archive is broken, holds no picture, or names a place outside its folder or a link (nothing
            of it is unpacked then); or the disk is too full.
    """
    with _opened(archive) as file:
        members = picture_members(file, archive)
        missing = {name: info for name, info in members.items() if not _is_there(folder / name, info)}
        temporary = _temporary(folder)
        rest = sum(info.file_size for name, info in missing.items() if not _is_there(temporary / name, info))
        need_space(folder, rest, f"the pictures of {archive.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        with progress_bar(f"{label}, unpacking", " pictures", len(members)) as bar:
            bar.update(len(members) - len(missing))
            for name, info in missing.items():
                if not _is_there(temporary / name, info):
                    _extract(file, info, temporary / name)
                bar.update(1)
    _move_in(temporary, folder)
    return len(members)


def picture_members(file: ZipFile, archive: Path) -> dict[str, ZipInfo]:
    """The pictures of an archive by their bare name; everything in it has been looked at.

    Raises:
        UserError: a member is not safe to unpack, two pictures have one name, or there is none.
    """
    members: dict[str, ZipInfo] = {}
    for info in file.infolist():
        _check_safe(info, archive)
        name = PurePosixPath(info.filename).name
        if info.is_dir() or not is_picture(name):
            continue
        if name in members:
            raise UserError(f"archive has two pictures '{name}'", archive, "nothing of it was unpacked")
        members[name] = info
    if not members:
        raise UserError("archive holds no picture", archive)
    return members


def _check_safe(info: ZipInfo, archive: Path) -> None:
    name = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        fault = "an absolute path"
    elif ".." in re.split(r"[/\\]", name):
        fault = "a path that leaves its folder"
    elif kind == stat.S_IFLNK:
        fault = "a symbolic link"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        fault = "something that is no file"
    elif info.flag_bits & ENCRYPTED:
        fault = "an encrypted file"
    else:
        return
    raise UserError(f"archive has {fault}, '{name}'", archive, "nothing of it was unpacked: get it from elsewhere")


@contextmanager
def _opened(archive: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(archive) as file:
            yield file
    except (BadZipFile, EOFError, NotImplementedError, ValueError, zlib.error) as error:
        raise UserError(f"archive is broken ({error})", archive, "delete it and run the command again") from None


def _temporary(folder: Path) -> Path:
    """Beside the folder; in it where it exists, since it may be another disk's."""
    beside = folder.with_name(f".{folder.name}{UNPACKING}")
    return folder / UNPACKING if folder.is_dir() and not beside.exists() else beside


def _is_there(path: Path, info: ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size


def _extract(file: ZipFile, info: ZipInfo, path: Path) -> None:
    """Writes one member; a damaged one leaves no file."""
    try:
        with file.open(info) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BUFFER)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _move_in(temporary: Path, folder: Path) -> None:
    if not folder.is_dir():
        os.replace(temporary, folder)
        return
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
    temporary.rmdir()

"""Unpacks the pictures of a zip archive into one flat folder: nothing outside of it, all or nothing."""

from __future__ import annotations

import os
import re
import shutil
import stat
import zlib
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from eagle.ge_data.download.inventory import is_picture, need_space
from eagle.ge_data.progress import progress_bar
from llava.errors import UserError

UNPACKING = ".unpacking"
ENCRYPTED = 1
"""Flag of a member."""


def unpack(archive: Path, folder: Path, label: str) -> int:
    """Puts the pictures of an archive into ``folder``, without the archive's folders; returns their number.

    Pictures of the right size that are there are kept. The others are unpacked into a temporary folder, which is then
    renamed to ``folder``, or its files are moved if ``folder`` exists. After a kill the next call resumes.

    Raises:
        UserError: the archive is damaged, has no picture, or has a link or a path that leaves the folder (then nothing
            is unpacked); or the disk does not have the space.
    """
    beside = folder.with_name(f".{folder.name}{UNPACKING}")
    temporary = folder / UNPACKING if folder.is_dir() and not beside.exists() else beside  # on the folder's own disk
    try:
        with ZipFile(archive) as file, progress_bar(f"{label}, unpacking", " pictures") as bar:
            members = _pictures(file, archive)
            todo = {name: info for name, info in members.items() if not _is_there(folder / name, info)}
            left = {name: info for name, info in todo.items() if not _is_there(temporary / name, info)}
            need_space(folder, sum(info.file_size for info in left.values()), f"the pictures of {archive.name}")
            temporary.mkdir(parents=True, exist_ok=True)
            bar.total = len(members)
            bar.update(len(members) - len(left))
            for name, info in left.items():
                _extract(file, info, temporary / name)
                bar.update(1)
    except (BadZipFile, EOFError, NotImplementedError, ValueError, zlib.error) as error:
        raise UserError(f"archive is damaged ({error})", archive, "delete it and run the command again") from None
    if folder.is_dir():
        for path in temporary.iterdir():
            os.replace(path, folder / path.name)
        temporary.rmdir()
    else:
        os.replace(temporary, folder)
    return len(members)


def _pictures(file: ZipFile, archive: Path) -> dict[str, ZipInfo]:
    """The pictures of an archive by file name, after a check of all its members."""
    members: dict[str, ZipInfo] = {}
    for info in file.infolist():
        if fault := _fault(info):
            raise UserError(f"archive has {fault}, '{info.orig_filename}'", archive, "nothing of it was unpacked")
        name = PurePosixPath(info.filename).name
        if info.is_dir() or not is_picture(name):
            continue
        if name in members:
            raise UserError(f"archive has two pictures '{name}'", archive, "nothing of it was unpacked")
        members[name] = info
    if not members:
        raise UserError("archive has no picture", archive)
    return members


def _fault(info: ZipInfo) -> str | None:
    """Why a member is not safe to unpack."""
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
    if re.match(r"[/\\]|[A-Za-z]:", name):
        return "an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "a path that leaves its folder"
    if kind == stat.S_IFLNK:
        return "a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a special file"
    return "an encrypted file" if info.flag_bits & ENCRYPTED else None


def _is_there(path: Path, info: ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size


def _extract(file: ZipFile, info: ZipInfo, path: Path) -> None:
    """Writes one member; a damaged one leaves no file."""
    try:
        with file.open(info) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 18)
    except BaseException:
        path.unlink(missing_ok=True)
        raise

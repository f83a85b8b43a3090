"""Unpacks the pictures of a zip archive into one flat folder, and nothing outside of it."""

from __future__ import annotations

import re
import shutil
import stat
import zlib
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from eagle.ge_data.download.inventory import COMPLETE, is_picture
from eagle.ge_data.download.transfer import need_space
from eagle.ge_data.progress import progress_bar
from llava.errors import UserError
from llava.files import atomic_write


def unpack(archive: Path, folder: Path, label: str) -> int:
    """Puts the pictures of an archive into ``folder``, without the archive's folders; returns their number.

    Pictures of the right size that are there are kept, so the next call resumes after a kill. When all are there, the
    file `COMPLETE` has their number.

    Raises:
        UserError: the archive is damaged, has no picture, or has a link or a path that leaves the folder (then nothing
            is unpacked); or the disk does not have the space.
    """
    try:
        with ZipFile(archive) as file, progress_bar(f"{label}, unpacking", " pictures") as bar:
            members = _pictures(file, archive)
            todo = {name: info for name, info in members.items() if not _is_there(folder / name, info)}
            need_space(folder, sum(info.file_size for info in todo.values()), f"the pictures of {archive.name}")
            bar.total = len(members)
            bar.update(len(members) - len(todo))
            for name, info in todo.items():
                _extract(file, info, folder / name)
                bar.update(1)
    except (BadZipFile, EOFError, RuntimeError, ValueError, zlib.error) as error:  # RuntimeError: encrypted
        raise UserError(f"archive is damaged ({error})", archive, "delete it and run the command again") from None
    (folder / COMPLETE).write_text(str(len(members)), encoding="ascii")
    return len(members)


def _pictures(file: ZipFile, archive: Path) -> dict[str, ZipInfo]:
    """The pictures of an archive by file name, after a check of all its members."""
    members: dict[str, ZipInfo] = {}
    for info in file.infolist():
        path, kind = info.orig_filename.replace("\\", "/"), stat.S_IFMT(info.external_attr >> 16)
        name, fault = PurePosixPath(info.filename).name, ""
        if re.match(r"/|[A-Za-z]:", path) or ".." in path.split("/"):
            fault = "a path that leaves its folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = "a link or a special file"
        elif name in members:
            fault = "two pictures of the same name"
        if fault:
            raise UserError(f"archive has {fault}, '{info.orig_filename}'", archive, "nothing of it was unpacked")
        if not info.is_dir() and is_picture(name):
            members[name] = info
    if not members:
        raise UserError("archive has no picture", archive)
    return members


def _is_there(path: Path, info: ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size


def _extract(file: ZipFile, info: ZipInfo, path: Path) -> None:
    with file.open(info) as source, atomic_write(path) as temporary, temporary.open("wb") as target:
        shutil.copyfileobj(source, target)

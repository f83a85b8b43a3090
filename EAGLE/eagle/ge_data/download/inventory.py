"""The pictures on the disk: which are there, which an annotation file needs, which are gone, and the free space."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from eagle.conversations import REASONS, Unusable, image_names, picture_path
from eagle.ge_data.annotations import iter_records
from eagle.ge_data.progress import format_bytes
from eagle.picture_sources import CoverSet, PictureSet, Source
from llava.errors import UserError
from llava.files import read_json, write_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
COMPLETE = ".complete.json"
"""File in the root: number of pictures in the archive of each unpacked set."""
GONE_LIST = "gone.txt"
"""File beside the folder of covers: name, address and reason of those that cannot be had, separated by tabs."""
SHOWN = 5
"""Missing names in a report."""
MAX_NAME = 200
"""Characters of a name in a report."""


def is_picture(name: str) -> bool:
    """Whether a file name is a picture's; hidden files do not count."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def picture_names(folder: Path) -> set[str]:
    """Names of the pictures in a folder, which need not exist."""
    return set(filter(is_picture, os.listdir(folder))) if folder.is_dir() else set()


def expected_pictures(root: Path, source: PictureSet) -> int:
    """Number of pictures of the complete set: what its archive had if it was unpacked here, else a constant."""
    return int(_complete(root).get(source.name, source.pictures))


def remember_complete(root: Path, source: PictureSet, pictures: int) -> None:
    """Records that all ``pictures`` of the set's archive are unpacked."""
    write_json(root / COMPLETE, {**_complete(root), source.name: pictures})


def gone_covers(folder: Path) -> dict[str, str]:
    """Name (without suffix) and address of the covers that are known to be gone. ``folder``: of the covers."""
    path = folder.parent / GONE_LIST
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split("\t")[:2] for line in lines if "\t" in line)


def remember_gone(folder: Path, name: str, address: str, reason: str) -> None:
    """Records that a cover is gone."""
    with (folder.parent / GONE_LIST).open("a", encoding="utf-8") as file:
        file.write("\t".join(" ".join(part.split()) for part in (name, address, reason)) + "\n")


def need_space(folder: Path, size: int, what: str) -> None:
    """Raises `UserError` if the disk of ``folder``, which need not exist, has less than ``size`` bytes free."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        message = f"not enough space for {what}: {format_bytes(size)} needed, {format_bytes(free)} free"
        raise UserError(message, folder, "free some space, or give another --root")


def report_sets(root: Path, sources: Sequence[Source]) -> tuple[list[str], bool]:
    """A line for each set, and whether all of them are complete."""
    lines, all_complete = [], True
    for source in sources:
        if isinstance(source, PictureSet):
            there, expected = len(picture_names(root / source.path)), expected_pictures(root, source)
            gone = len(_gone_names(root, source))
            missing = max(0, expected - there - gone)
            text = f"{there:>7,} of {expected:>7,} pictures" + (f", {gone:,} gone" if gone else "")
            text += f", {missing:,} missing" if missing else ", complete"
        else:
            missing = not (root / source.path).is_file()
            text = "missing" if missing else "there"
        lines.append(f"{source.name:<9} {text:<52} {source.path}")
        all_complete = all_complete and not missing
    return lines, all_complete


def _name_in(root: Path, name: str) -> str:
    """A picture's name relative to the folder of pictures."""
    path = picture_path(root, name)
    folders = [folder for folder in (root.absolute(), root.resolve()) if path.is_relative_to(folder)]
    return path.relative_to(folders[0]).as_posix() if Path(name).is_absolute() and folders else name


def report_needed(root: Path, sources: Sequence[Source], annotations: Path, all_sets: bool) -> tuple[list[str], bool]:
    """Lines on the pictures that an annotation file names, and whether all that are not gone are there.

    Records with unusable names are counted; the allocation skips them.

    Args:
        all_sets: also report names that belong to no set.

    Raises:
        UserError: the file cannot be read.
    """
    needed: defaultdict[str, set[str]] = defaultdict(set)  # file names of each folder
    unusable: Counter[str] = Counter()
    records = with_pictures = 0
    for placed in iter_records(annotations):
        records += 1
        try:
            names = [_name_in(root, name) for name in image_names(placed.value)]
        except Unusable as error:
            unusable[error.reason] += 1
            continue
        with_pictures += bool(names)
        for name in names:
            folder, _, file = name.rpartition("/")
            needed[folder].add(file)
    lines, complete = [f"{annotations}: {records:,} records, {with_pictures:,} with pictures"], True
    lines += [f"{n:,} records name no usable picture: {REASONS[reason]}" for reason, n in sorted(unusable.items())]
    for source in sources:
        if isinstance(source, PictureSet):
            wanted = needed.pop(source.path, set())
            missing = wanted - picture_names(root / source.path)
            gone = missing & _gone_names(root, source)
            lines += _needed_lines(source.name, len(wanted), {f"{source.path}/{name}" for name in missing}, len(gone))
            complete = complete and missing == gone
    if all_sets and needed:
        wanted = {f"{folder}/{name}" if folder else name for folder, names in needed.items() for name in names}
        missing = {name for name in wanted if not _is_file(root / name)}
        lines += _needed_lines("other", len(wanted), missing, 0)
        complete = complete and not missing
    return lines, complete


def _needed_lines(label: str, needed: int, missing: set[str], gone: int) -> list[str]:
    text = f"{label:<9} {needed:>7,} needed, {needed - len(missing):>7,} there, {len(missing):>7,} missing"
    lines = [text + (f", {gone:,} of them gone from the web" if gone else "")]
    for name in sorted(missing)[:SHOWN]:
        name = name if name.isprintable() else repr(name)
        lines.append(f"{'':<9} {name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + '...'}")
    return lines if len(missing) <= SHOWN else [*lines, f"{'':<9} and {len(missing) - SHOWN:,} more"]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _gone_names(root: Path, source: PictureSet) -> set[str]:
    return {f"{name}.jpg" for name in gone_covers(root / source.path)} if isinstance(source, CoverSet) else set()


def _complete(root: Path) -> dict[str, int]:
    return dict(read_json(root / COMPLETE, "list of complete sets")) if (root / COMPLETE).exists() else {}

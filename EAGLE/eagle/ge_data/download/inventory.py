"""The pictures on the disk: which are there, which are gone from the web, and which an annotation file needs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from eagle.conversations import REASONS, Unusable, image_names, picture_path
from eagle.ge_data.annotations import iter_records
from eagle.ge_data.download.sources import Source

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
COMPLETE = ".complete"
"""File in a folder of pictures: number of pictures in the archive that was unpacked there."""
GONE_LIST = "gone.txt"
"""File beside the folder of covers: name, address and reason of those that cannot be downloaded, separated by tabs."""
OTHER = "other"
SHOWN = 5
"""Missing names in a report."""
MAX_NAME = 200
"""Characters of such a name."""


class PictureCount(NamedTuple):
    """Pictures of a set: in its folder, in the complete set, and known to be gone from the web."""

    there: int
    expected: int
    gone: int

    @property
    def missing(self) -> int:
        return max(0, self.expected - self.there - self.gone)


def count_pictures(root: Path, source: Source) -> PictureCount:
    """Counts a set. It is expected to have what its archive had if that was unpacked here, else what the table says."""
    folder = root / source.path
    complete = folder / COMPLETE
    expected = int(complete.read_text(encoding="ascii")) if complete.exists() else source.pictures
    return PictureCount(len(picture_names(folder)), expected, len(gone_covers(folder)))


def is_picture(name: str) -> bool:
    """Whether a file name is a picture's; hidden files do not count."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def picture_names(folder: Path) -> set[str]:
    """Names of the pictures in a folder, which need not exist."""
    return set(filter(is_picture, os.listdir(folder))) if folder.is_dir() else set()


def gone_covers(folder: Path) -> dict[str, str]:
    """Name (without suffix) and address of the covers that are known to be gone. ``folder``: of the covers."""
    path = folder.parent / GONE_LIST
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split("\t")[:2] for line in lines if "\t" in line)


def remember_gone(folder: Path, name: str, address: str, reason: str) -> None:
    """Records that a cover is gone."""
    with (folder.parent / GONE_LIST).open("a", encoding="utf-8") as file:
        file.write("\t".join(" ".join(part.split()) for part in (name, address, reason)) + "\n")


def report_sets(root: Path, sources: Sequence[Source]) -> tuple[list[str], bool]:
    """A line for each set, and whether all of them are complete."""
    lines, complete = [], True
    for source in sources:
        if source.kind == "annotations":
            missing = not (root / source.path).is_file()
            text = "missing" if missing else "there"
        else:
            count = count_pictures(root, source)
            missing = count.missing > 0
            text = f"{count.there:>7,} of {count.expected:>7,} pictures"
            text += f", {count.gone:,} gone" if count.gone else ""
            text += f", {count.missing:,} missing" if missing else ", complete"
        lines.append(f"{source.name:<9} {text:<52} {source.path}")
        complete = complete and not missing
    return lines, complete


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
    set_names = {source.path: source.name for source in sources if source.pictures}
    needed: dict[str, set[str]] = {name: set() for name in [*set_names.values(), OTHER]}
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
            needed[set_names.get(os.path.dirname(name), OTHER)].add(name)
    if not all_sets or not needed[OTHER]:
        del needed[OTHER]
    files_in = cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
    gone = {f"{source.path}/{name}.jpg" for source in sources for name in gone_covers(root / source.path)}
    lines, complete = [f"{annotations}: {records:,} records, {with_pictures:,} with pictures"], True
    lines += [f"{n:,} records name no usable picture: {REASONS[reason]}" for reason, n in sorted(unusable.items())]
    for label, wanted in needed.items():
        missing = {name for name in wanted if os.path.basename(name) not in files_in(root / os.path.dirname(name))}
        lines += _needed_lines(label, len(wanted), sorted(missing), len(missing & gone))
        complete = complete and missing <= gone
    return lines, complete


def _needed_lines(label: str, needed: int, missing: list[str], gone: int) -> list[str]:
    text = f"{label:<9} {needed:>7,} needed, {needed - len(missing):>7,} there, {len(missing):>7,} missing"
    lines = [text + (f", {gone:,} of them gone from the web" if gone else "")]
    lines += [f"{'':<9} {name.encode('unicode_escape').decode():.{MAX_NAME}}" for name in missing[:SHOWN]]
    return lines if len(missing) <= SHOWN else [*lines, f"{'':<9} and {len(missing) - SHOWN:,} more"]

"""Folders of pictures on the disk: how many there are, whether a set is complete, whether more fits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from eagle.hidden_states.index import gigabytes
from eagle.picture_sources import PictureSet
from llava.errors import UserError
from llava.files import atomic_write, read_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
COMPLETE = ".complete.json"
"""File in the root: how many pictures the archive of each unpacked set had."""
GONE_LIST = "gone.txt"
"""File beside the folder of covers: name, address and reason of those that cannot be had from there, parted by tabs."""


def is_picture(name: str) -> bool:
    """Whether a file's name is a picture's; hidden files are none."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def picture_names(folder: Path) -> set[str]:
    """Names of the pictures in a folder; none if there is no such folder."""
    return set(filter(is_picture, os.listdir(folder))) if folder.is_dir() else set()


def expected_pictures(root: Path, source: PictureSet) -> int:
    """How many pictures make the set complete: what its archive had, else what the table says."""
    return int(_complete(root).get(source.name, source.pictures))


def remember_complete(root: Path, source: PictureSet, pictures: int) -> None:
    """Notes that all ``pictures`` of the set's archive are in place."""
    known = {**_complete(root), source.name: pictures}
    with atomic_write(root / COMPLETE) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def gone_covers(folder: Path) -> dict[str, str]:
    """Name (without suffix) and address of the covers of a folder that are known to be gone."""
    path = folder.parent / GONE_LIST
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split("\t")[:2] for line in lines if "\t" in line)


def remember_gone(folder: Path, name: str, address: str, reason: str) -> None:
    """Notes that a cover is gone."""
    with (folder.parent / GONE_LIST).open("a", encoding="utf-8") as file:
        file.write("\t".join(" ".join(part.split()) for part in (name, address, reason)) + "\n")


def need_space(folder: Path, size: int, what: str) -> None:
    """Checks that ``size`` bytes more fit on the disk that ``folder`` is or will be on.

    Raises:
        UserError: they do not.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise UserError(
            f"no room for {what}: {gigabytes(size)} needed, {gigabytes(free)} free",
            folder,
            "make room, or give another --root",
        )


def _complete(root: Path) -> dict[str, int]:
    path = root / COMPLETE
    known: dict[str, int] = read_json(path, "list of complete sets") if path.exists() else {}
    return known

"""What is there of the training sets, and what an annotation file needs of them; downloads nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from eagle.ge_data.annotations import iter_rows
from eagle.ge_data.conversations import image_names
from eagle.ge_data.image_sets import CoverSet, PictureSet, Source
from eagle.ge_data.picture_folder import expected_pictures, gone_covers, picture_names

FIRST = 5
"""So many missing names are shown."""
OTHER = "other"


def report_sets(root: Path, sources: Sequence[Source]) -> tuple[list[str], bool]:
    """A line for each set, and whether all are complete."""
    lines, whole = [], True
    for source in sources:
        if isinstance(source, PictureSet):
            text, complete = _picture_line(root, source)
        else:
            complete = (root / source.path).is_file()
            text = "there" if complete else "missing"
        lines.append(f"{source.name:<9} {text:<52} {source.path}")
        whole = whole and complete
    return lines, whole


def report_needed(root: Path, sources: Sequence[Source], annotations: Path, all_sets: bool) -> tuple[list[str], bool]:
    """Lines on the pictures that an annotation file names, and whether all are there.

    Args:
        all_sets: also report names that belong to no set.

    Raises:
        UserError: the file is missing or broken.
    """
    needed, rows, with_pictures = _needed(annotations)
    lines, whole = [f"{annotations}: {rows:,} rows, {with_pictures:,} with pictures"], True
    sets = [source for source in sources if isinstance(source, PictureSet)]
    for source in sets:
        names = needed.pop(source.path, set())
        missing = names - picture_names(root / source.path)
        gone = missing & _gone_names(root, source)
        lines += _needed_lines(source.name, len(names), sorted(f"{source.path}/{n}" for n in missing), len(gone))
        whole = whole and not missing
    if all_sets and needed:
        names = {_joined(folder, name) for folder, found in needed.items() for name in found}
        missing = {name for name in names if not (root / name).is_file()}
        lines += _needed_lines(OTHER, len(names), sorted(missing), 0)
        whole = whole and not missing
    return lines, whole


def _picture_line(root: Path, source: PictureSet) -> tuple[str, bool]:
    folder = root / source.path
    there, expected = len(picture_names(folder)), expected_pictures(root, source)
    gone = len(gone_covers(folder)) if isinstance(source, CoverSet) else 0
    missing = max(0, expected - there - gone)
    text = f"{there:>7,} of {expected:>7,} pictures"
    if gone:
        text += f", {gone:,} gone"
    return text + (f", {missing:,} missing" if missing else ", complete"), not missing


def _needed(annotations: Path) -> tuple[dict[str, set[str]], int, int]:
    """Names by folder; rows; rows with pictures."""
    needed: defaultdict[str, set[str]] = defaultdict(set)
    rows = with_pictures = 0
    for row in iter_rows(annotations):
        names = image_names(row.value)
        rows += 1
        with_pictures += bool(names)
        for name in names:
            folder, _, last = name.rpartition("/")
            needed[folder].add(last)
    return needed, rows, with_pictures


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _gone_names(root: Path, source: PictureSet) -> set[str]:
    return {f"{name}.jpg" for name in gone_covers(root / source.path)} if isinstance(source, CoverSet) else set()


def _needed_lines(label: str, needed: int, missing: Sequence[str], gone: int) -> list[str]:
    text = f"{label:<9} {needed:>7,} needed, {needed - len(missing):>7,} there, {len(missing):>7,} missing"
    lines = [text + (f", {gone:,} of them gone from the web" if gone else "")]
    lines += [f"{'':<9} {name}" for name in missing[:FIRST]]
    if len(missing) > FIRST:
        lines.append(f"{'':<9} and {len(missing) - FIRST:,} more")
    return lines

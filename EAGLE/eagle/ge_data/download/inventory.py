"""What is there of the training sets, and what an annotation file needs of them; downloads nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eagle.conversations import REASONS, Unusable, image_names
from eagle.ge_data.annotations import iter_rows
from eagle.ge_data.download.picture_folder import expected_pictures, gone_covers, picture_names
from eagle.picture_sources import CoverSet, PictureSet, Source

FIRST = 5
"""So many missing names are shown."""
LONGEST = 200
"""Characters of a name that are shown."""
OTHER = "other"


@dataclass
class Needs:
    """What an annotation file names. ``names``: of pictures, by folder; ``with_pictures``: rows that name some;
    ``unusable``: rows whose names are none, by reason (a key of `REASONS`)."""

    names: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    rows: int = 0
    with_pictures: int = 0
    unusable: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, annotations: Path) -> Needs:
        """Those of a file.

        Raises:
            UserError: it is missing or broken.
        """
        needs = cls()
        for row in iter_rows(annotations):
            needs.rows += 1
            try:
                names = image_names(row.value)
            except Unusable as unusable:
                needs.unusable[unusable.reason] += 1
                continue
            needs.with_pictures += bool(names)
            for name in names:
                folder, _, last = name.rpartition("/")
                needs.names[folder].add(last)
        return needs


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
    """Lines on the pictures that an annotation file names, and whether all are there that can be had. Rows whose names
    are none are counted and do not matter: the allocation skips them.

    Args:
        all_sets: also report names that belong to no set.

    Raises:
        UserError: the file is missing or broken.
    """
    needs = Needs.of(annotations)
    needed = needs.names
    lines, whole = [f"{annotations}: {needs.rows:,} rows, {needs.with_pictures:,} with pictures"], True
    for reason, count in sorted(needs.unusable.items()):
        lines.append(f"{count:,} rows name no usable picture: {REASONS[reason]}")
    sets = [source for source in sources if isinstance(source, PictureSet)]
    for source in sets:
        names = needed.pop(source.path, set())
        missing = names - picture_names(root / source.path)
        gone = missing & _gone_names(root, source)
        lines += _needed_lines(source.name, len(names), sorted(f"{source.path}/{n}" for n in missing), len(gone))
        whole = whole and not missing - gone
    if all_sets and needed:
        names = {_joined(folder, name) for folder, found in needed.items() for name in found}
        missing = {name for name in names if not _is_file(root / name)}
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


def _is_file(path: Path) -> bool:
    """False too for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _shown(name: str) -> str:
    """A name as one printable piece of a line."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _gone_names(root: Path, source: PictureSet) -> set[str]:
    return {f"{name}.jpg" for name in gone_covers(root / source.path)} if isinstance(source, CoverSet) else set()


def _needed_lines(label: str, needed: int, missing: Sequence[str], gone: int) -> list[str]:
    text = f"{label:<9} {needed:>7,} needed, {needed - len(missing):>7,} there, {len(missing):>7,} missing"
    lines = [text + (f", {gone:,} of them gone from the web" if gone else "")]
    lines += [f"{'':<9} {_shown(name)}" for name in missing[:FIRST]]
    if len(missing) > FIRST:
        lines.append(f"{'':<9} and {len(missing) - FIRST:,} more")
    return lines

"""Rows whose pictures are not there: said before the model is loaded, and made anew once the pictures are there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from eagle.conversations import Unusable, image_names, open_picture, picture_is_there
from eagle.ge_data.selection import Range, Selection
from eagle.hidden_states.index import ShardInfo, read_about
from llava.errors import UserError

LOOKED_AT = 200
"""Rows whose pictures are looked for before the work begins."""
ENOUGH = 20
"""So many rows without pictures are no chance any more, even where earlier ones had theirs."""
REASONS = ("missing_picture", "broken_picture")


def look_for_pictures(selection: Selection, ranges: Sequence[Range], begun: bool) -> str | None:
    """Looks for the pictures of up to `LOOKED_AT` rows of the ranges; returns what the user should know, if anything.

    Args:
        begun: earlier shards are there: a few rows that are left may all lack their pictures.

    Raises:
        UserError: no row has its pictures, so the folder is the wrong one; or the file system cannot tell.
    """
    indices = [index for first, last in ranges for index in range(first, last)]
    looked, lacking = 0, []
    for index in indices[:: -(-len(indices) // LOOKED_AT)]:
        names = _names(selection, int(selection.order[index]))
        looked += bool(names)
        lacking += [path for path in (selection.image_root / name for name in names) if not picture_is_there(path)][:1]
    if not lacking:
        return None
    if len(lacking) == looked and (looked >= ENOUGH or not begun):
        raise UserError(
            f"of {looked} rows that were looked at, none has its pictures",
            lacking[0],
            "--image_data_path is the folder that the rows' paths start from",
        )
    return (
        f"of {looked} rows that were looked at, {len(lacking)} ({len(lacking) / looked:.0%}) lack a picture, such as "
        f"{lacking[0]}; which ones: python -m eagle.ge_data.download --root {selection.image_root} --check "
        f"--annotations {selection.rows.path}"
    )


def mended_shards(folder: Path, shards: Sequence[ShardInfo], selection: Selection, span: Range) -> list[ShardInfo]:
    """The shards within a range that skipped a row for its picture where it can be read by now."""
    start, end = span
    return [
        shard
        for shard in shards
        if start <= shard.start
        and shard.end <= end
        and any(reason in shard.skipped for reason in REASONS)
        and any(
            row["reason"] in REASONS and _is_readable(selection, row["row"])
            for row in read_about(folder / shard.file)["skipped"]
        )
    ]


def _is_readable(selection: Selection, number: int) -> bool:
    """Whether all pictures of a row can be read. ``number``: in the annotation file."""
    try:
        for name in _names(selection, bisect_left(selection.rows.numbers, number)):
            open_picture(selection.image_root / name)
    except Unusable:
        return False
    return True


def _names(selection: Selection, place: int) -> tuple[str, ...]:
    """The pictures of a row; none where the row's names are none. ``place``: among the rows of its kind."""
    try:
        return image_names(selection.rows[place])
    except Unusable:
        return ()

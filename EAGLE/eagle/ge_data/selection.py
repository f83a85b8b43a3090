"""Which records of an annotation file are read and in which order, and which of their pictures are missing."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from eagle.conversations import (
    Conversation,
    Unusable,
    claims_pictures,
    count_unknown_keys,
    id_to_show,
    image_names,
    open_picture,
    picture_is_there,
    picture_path,
    read_conversation,
    unknown_keys_note,
)
from eagle.ge_data.annotations import Record, RecordFile
from eagle.hidden_states.index import ShardInfo, Skipped, read_header
from llava.errors import UserError

if TYPE_CHECKING:
    from eagle.families import Target
    from eagle.families.template import Prepared, PromptOutline, Template

TEXT, IMAGE = "text", "image"
MAX_CHECKED = 200
"""Number of records whose pictures are checked before the model is loaded."""
ENOUGH_CHECKED = 20
"""If none of so many records has its pictures, the folder is wrong, even if earlier shards had theirs."""
PICTURE_REASONS = ("missing_picture", "broken_picture")

Range = tuple[int, int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Selection:
    """The text or image records of an annotation file, shuffled.

    ``order``: indices into ``records``; ``max_length``: tokens of the longest conversation; ``unknown``: number of
    records with each key that is not read.
    """

    records: RecordFile
    order: Sequence[int]
    image_root: Path
    max_length: int
    unknown: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, kind: str, image_root: Path, max_length: int, seed: int) -> Selection:
        """All records of one kind (`TEXT` or `IMAGE`), shuffled with ``seed``.

        Raises:
            UserError: the file cannot be read, has no such record, or the folder of pictures does not exist.
        """
        import numpy as np

        if kind == IMAGE and not image_root.is_dir():
            raise UserError("no folder of pictures", image_root, "give --image_data_path, in training --image-folder")
        unknown: Counter[str] = Counter()

        def keep(record: Record) -> bool:
            count_unknown_keys(record, unknown)
            return claims_pictures(record) == (kind == IMAGE)

        records = RecordFile(path, keep)
        if not len(records):
            raise UserError(f"no {kind} records among the {records.total} records", path)
        order = np.random.default_rng(seed).permutation(len(records)).tolist()
        return cls(records, order, image_root, max_length, unknown)

    def number(self, index: int) -> int:
        """The number of a record in the annotation file. ``index``: in the shuffled order."""
        return self.records.numbers[self.order[index]]

    def prepare(self, template: Template, index: int) -> Prepared | Skipped:
        """Record ``index`` of the shuffled order as model inputs, or why it cannot be used."""
        return self._read(index, lambda one: template.prepare(one, self.image_root, self.max_length))

    def outline(self, template: Template, index: int) -> PromptOutline | Skipped:
        """The questions of record ``index`` of the shuffled order, or why it cannot be used."""
        return self._read(index, lambda one: template.outline(one, self.image_root, self.max_length), answers=False)

    def _read(self, index: int, write: Callable[[Conversation], Result], answers: bool = True) -> Result | Skipped:
        record, number = self.records[self.order[index]], self.number(index)
        try:
            return write(read_conversation(record, number, answers))
        except Unusable as unusable:
            return Skipped(number, id_to_show(record, number), unusable.reason)

    def within(self, target: Target) -> Selection:
        """The same selection, with ``max_length`` at most the number of the target's positions."""
        from eagle.families.layers import position_limit  # not at import time: it loads torch

        positions = position_limit(target.config.get_text_config()) or self.max_length
        return replace(self, max_length=min(positions, self.max_length))


def ignored_keys(selection: Selection) -> str | None:
    """A note for the user if records have keys that are not read."""
    line = unknown_keys_note(selection.unknown)
    return line and f"{selection.records.path}: {line}"


def shortened(wanted: int, selection: Selection) -> str | None:
    """A note for the user if `Selection.within` reduced the maximal length."""
    if selection.max_length == wanted:
        return None
    return f"--max-length {wanted}: the model has {selection.max_length} positions, longer conversations are cut there"


def check_pictures(selection: Selection, ranges: Sequence[Range], begun: bool) -> str | None:
    """Looks for the pictures of up to `MAX_CHECKED` records of the ranges; returns a note if some are missing.

    Args:
        begun: earlier shards exist, so that the few records that are left may all lack their pictures.

    Raises:
        UserError: no record has its pictures, so the folder is wrong; or the file system cannot tell.
    """
    indices = [index for first, last in ranges for index in range(first, last)]
    checked, missing = 0, []
    for index in indices[:: -(-len(indices) // MAX_CHECKED)]:
        names = _picture_names(selection, selection.order[index])
        checked += bool(names)
        missing += [selection.image_root / name for name in names if not _is_there(selection.image_root, name)][:1]
    if not missing:
        return None
    if len(missing) == checked and (checked >= ENOUGH_CHECKED or not begun):
        raise UserError(
            f"none of {checked} records that were checked has its pictures",
            missing[0],
            f"--image_data_path {selection.image_root} is the folder that the paths in the records start from, or that "
            "absolute ones are inside of",
        )
    return (
        f"{len(missing)} of {checked} records that were checked ({len(missing) / checked:.0%}) lack a picture, such as "
        f"{missing[0]}; for a list: python -m eagle.ge_data.download --root {selection.image_root} --check "
        f"--annotations {selection.records.path}"
    )


def repairable_shards(folder: Path, shards: Sequence[ShardInfo], selection: Selection, span: Range) -> list[ShardInfo]:
    """The shards within a range that skipped a record because of a picture that can be read by now."""
    start, end = span
    return [
        shard
        for shard in shards
        if start <= shard.start
        and shard.end <= end
        and any(reason in shard.skipped for reason in PICTURE_REASONS)
        and any(
            record.reason in PICTURE_REASONS and _is_readable(selection, record.row)
            for record in read_header(folder / shard.file).skipped
        )
    ]


def _is_readable(selection: Selection, number: int) -> bool:
    """Whether all pictures of a record can be read. ``number``: in the annotation file."""
    try:
        for name in _picture_names(selection, bisect_left(selection.records.numbers, number)):
            open_picture(picture_path(selection.image_root, name))
    except Unusable:
        return False
    return True


def _is_there(root: Path, name: str) -> bool:
    try:
        return picture_is_there(picture_path(root, name))
    except Unusable:
        return False


def _picture_names(selection: Selection, place: int) -> tuple[str, ...]:
    """The pictures of a record, () if their names are unusable. ``place``: among ``selection.records``."""
    try:
        return image_names(selection.records[place])
    except Unusable:
        return ()

"""Which rows of an annotation file are read, in which order, and what each of them is to the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from eagle.conversations import Conversation, Unusable, claims_pictures, id_to_show, read_conversation
from eagle.families import Target
from eagle.families.template import Prepared, PromptOutline, Template
from eagle.ge_data.annotations import Row, RowFile
from eagle.hidden_states.index import Skipped
from llava.errors import UserError

TEXT, IMAGE = "text", "image"

Range = tuple[int, int]
Made = TypeVar("Made", Prepared, PromptOutline)


def wants_pictures(row: Row) -> bool:
    """Whether a row belongs to the image half of the training data."""
    return claims_pictures(row)


def wants_text(row: Row) -> bool:
    """Whether a row belongs to the text half of the training data."""
    return not claims_pictures(row)


@dataclass(frozen=True)
class Selection:
    """What is to be read. ``order``: the shuffled selection, indices into ``rows``; ``max_length``: tokens of the
    longest conversation."""

    rows: RowFile
    order: Sequence[int]
    image_root: Path
    max_length: int

    @classmethod
    def of(cls, path: Path, kind: str, image_root: Path, max_length: int, seed: int) -> Selection:
        """All rows of one kind, shuffled by ``seed``.

        Raises:
            UserError: the file cannot be read, no row is of that kind, or there is no folder of pictures.
        """
        if kind == IMAGE and not image_root.is_dir():
            raise UserError("no folder of pictures", image_root, "give --image_data_path, in training --image-folder")
        rows = RowFile(path, wants_pictures if kind == IMAGE else wants_text)
        if not len(rows):
            raise UserError(f"no {kind} rows among the {rows.total} rows", path)
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        return cls(rows, order, image_root, max_length)

    def number(self, index: int) -> int:
        """The row's number in the annotation file. ``index``: in the shuffled order."""
        return self.rows.numbers[int(self.order[index])]

    def prepare(self, template: Template, index: int) -> Prepared | Skipped:
        """Row ``index`` of the shuffled order as model inputs, or why it cannot be used."""
        return self._row(index, lambda conversation: template.prepare(conversation, self.image_root, self.max_length))

    def outline(self, template: Template, index: int) -> PromptOutline | Skipped:
        """The same without its answers."""

        def write(conversation: Conversation) -> PromptOutline:
            return template.outline(conversation, self.image_root, self.max_length)

        return self._row(index, write, keep_answers=False)

    def _row(self, index: int, write: Callable[[Conversation], Made], keep_answers: bool = True) -> Made | Skipped:
        place = int(self.order[index])
        row, number = self.rows[place], self.rows.numbers[place]
        try:
            return write(read_conversation(row, number, keep_answers))
        except Unusable as unusable:
            return Skipped(number, id_to_show(row, number), unusable.reason)

    def within(self, target: Target) -> Selection:
        """The same with conversations no longer than the target has positions."""
        positions = getattr(target.config.get_text_config(), "max_position_embeddings", self.max_length)
        return replace(self, max_length=min(positions, self.max_length))


def shortened(wanted: int, selection: Selection) -> str | None:
    """What to say where `Selection.within` has lowered a length that was asked for; None where it has not."""
    if selection.max_length == wanted:
        return None
    return f"--max-length {wanted}: the model has {selection.max_length} positions, longer conversations are cut there"

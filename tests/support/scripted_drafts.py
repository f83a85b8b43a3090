"""Drafts that a test chooses. No pytest in here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eagle.decode.decoder import Decoder
from eagle.decode.drafter import Drafter
from eagle.decode.sequence import Sequence
from eagle.decode.tree import Candidates
from eagle.decode.tree_config import TreeConfig


def draft_by(monkeypatch: Any, expand: Callable[[list[tuple[int, Sequence]], TreeConfig], Candidates]) -> None:
    """Replaces what drafts predict by ``expand``. It is called with the active sequences of the batch, each with its
    number in the request, and the bounds of the trees."""
    init, draft = Decoder.__init__, Decoder.draft

    def numbered(decoder: Decoder, *arguments: Any) -> None:
        init(decoder, *arguments)
        for number, sequence in enumerate(decoder.sequences):
            sequence.number = number  # type: ignore[attr-defined]

    def with_sequences(decoder: Decoder, *arguments: Any) -> Any:
        if decoder.drafter is not None:
            decoder.drafter.sequences = decoder.active  # type: ignore[attr-defined]
        return draft(decoder, *arguments)

    def scripted(drafter: Any, tree: TreeConfig, should_deepen: Any = None) -> Candidates:
        return expand([(sequence.number, sequence) for sequence in drafter.sequences], tree)

    monkeypatch.setattr(Decoder, "__init__", numbered)
    monkeypatch.setattr(Decoder, "draft", with_sequences)
    monkeypatch.setattr(Drafter, "expand", scripted)

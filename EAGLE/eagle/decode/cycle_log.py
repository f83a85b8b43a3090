"""The new tokens of each cycle as they are emitted, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eagle.decode.detokenizer import Detokenizer


class CycleLog:
    """A streamer that keeps the new tokens of the prefill and of each cycle as they are emitted."""

    def __init__(self) -> None:
        self.cycles: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        """The prompt [1, P] is not kept."""

    def put_cycle(self, tokens: list[int], accepted: int) -> None:
        """Called by the decoder; the first ``accepted`` tokens were drafted."""
        self.cycles.append(list(tokens))

    def end(self) -> None:
        """Nothing is left."""


def pieces_of(tokenizer: Any, cycles: Sequence[Sequence[int]], accepted: Sequence[int]) -> list[tuple[str, int]]:
    """The text of each new token of an answer, with its depth in the draft tree; 0 for tokens of the target itself.

    Args:
        cycles: new tokens of the prefill, then of each cycle.
        accepted: drafted tokens accepted in each cycle.
    """
    text, pieces = Detokenizer(tokenizer), list[tuple[str, int]]()
    for tokens, drafted in zip(cycles, [0, *accepted], strict=True):
        pieces += [(text.add(token), place if place <= drafted else 0) for place, token in enumerate(tokens, 1)]
    return [*pieces, (text.rest(), 0)]


def logged_answer(question: Any, cycles: list[list[int]], accepted: list[int], tokenizer: Any) -> dict[str, Any]:
    """An answer as reports have it: its question (a `Question`), its tokens by cycle, and its text by pieces."""
    return {
        "id": question.id,
        "source": question.source,
        "question": question.question,
        "images": [str(path) for path in question.images],
        "cycles": cycles,
        "accepted": accepted,
        "pieces": pieces_of(tokenizer, cycles, accepted),
    }

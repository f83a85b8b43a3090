"""Random conversations: one picture with one to four questions, or text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .ask_charts import CHART_ASKERS, LINE_ASKERS
from .ask_scenes import SCENE_ASKERS, draw_scene_data
from .english import ask_text
from .phrases import Turn
from .quiz import quiz
from .spec import Picture, is_heldout
from .tables import draw_chart_data

KINDS = ("hbar", "vbar", "line", "pie", "scene")
WEIGHTS = (1.0, 1.2, 1.2, 0.8, 1.0)
ASKERS: dict[str, Any] = {
    "hbar": CHART_ASKERS, "vbar": CHART_ASKERS, "pie": CHART_ASKERS, "line": LINE_ASKERS, "scene": SCENE_ASKERS,
}  # fmt: skip
TEXT_SHARE = 0.12
MAX_TURNS = 4


@dataclass(frozen=True)
class Conversation:
    """Turns about one picture, or about a text if there is none."""

    picture: Picture | None
    turns: list[Turn]


def draw_picture_data(
    rng: Random, heldout: bool, kind: str | None = None, weights: tuple[float, ...] = WEIGHTS
) -> Picture:
    """The data of a picture from the wanted side of the split."""
    kind = kind or rng.choices(KINDS, weights)[0]
    while True:
        picture: Picture = draw_scene_data(rng) if kind == "scene" else draw_chart_data(rng, kind)
        if is_heldout(picture) == heldout:
            return picture


def ask(rng: Random, picture: Picture, number: int) -> list[Turn]:
    """Some different questions about a picture."""
    askers: list[tuple[Callable[[Random, Any], Turn | None], float]] = list(ASKERS[picture.kind])
    turns: list[Turn] = []
    while askers and len(turns) < number:
        chosen = rng.choices(askers, [w for _, w in askers])[0]
        askers.remove(chosen)
        turn = chosen[0](rng, picture)
        if turn is not None:
            turns.append(turn)
    return turns


def converse(
    rng: Random,
    heldout: bool = False,
    text_share: float = TEXT_SHARE,
    turns: int = MAX_TURNS,
    quiz_share: float = 0.0,
    weights: tuple[float, ...] = WEIGHTS,
) -> Conversation:
    """A random conversation; pictures of training and held-out conversations never have the same data.

    `quiz_share` of those with a picture ask many short questions instead of up to `turns` long ones; `weights` says
    how often each of KINDS comes.
    """
    if rng.random() < text_share:
        return Conversation(None, ask_text(rng))
    picture = draw_picture_data(rng, heldout, weights=weights)
    if rng.random() < quiz_share:
        return Conversation(picture, quiz(rng, picture))
    return Conversation(picture, ask(rng, picture, rng.randint(1, turns)))

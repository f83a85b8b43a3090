"""Another picture for a question: what would be right there is wrong here, so a blind model cannot pass.

The other picture holds the same names where the question needs them, but other data: the values of another
real chart, or other shapes. Its own right answer, scored against this picture's facts, is the level of chance.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from .facts import is_right
from .phrases import Turn
from .sample import ASKERS, draw_picture_data
from .spec import Chart, Picture, Scene

PROPOSALS = 60
TRIES = 40
GENERAL = ("describe", "title", "extremes", "order start", "order end", "count")


def _is_general(turn: Turn) -> bool:
    """True for questions which name nothing that only some pictures have."""
    return turn.kind in GENERAL


def _subjects(turn: Turn) -> tuple[str, ...]:
    return tuple(sorted({f"{f['slot']} {f['subject']}" for f in turn.facts}))


def _other_chart(rng: Random, chart: Chart, keep_names: bool) -> Chart:
    """A real chart of the same kind, under the names of this one if the question needs them."""
    while True:
        other = draw_picture_data(rng, True, chart.kind)
        assert isinstance(other, Chart)
        if not keep_names:
            return other
        if len(other.names) == len(chart.names):
            return replace(other, names=chart.names)


def _other_scene(rng: Random, scene: Scene) -> Scene:
    """Another scene, or the things of this one at other places."""
    if rng.random() < 0.5:
        other = draw_picture_data(rng, True, "scene")
        assert isinstance(other, Scene)
        return other
    places = sorted(rng.sample(range(9), len(scene.things)))
    things = rng.sample(scene.things, len(scene.things))
    return Scene(tuple(replace(t, place=p) for t, p in zip(things, places, strict=True)))


def _asked_there(rng: Random, picture: Picture, turn: Turn) -> Turn | None:
    """The same question about the other picture, or None if it cannot be asked there."""
    for _ in range(TRIES):
        for asker, _ in ASKERS[picture.kind]:
            found = asker(rng, picture)
            if found is None or found.kind != turn.kind:
                continue
            if _is_general(turn) or _subjects(found) == _subjects(turn):
                return found
    return None


def _other(rng: Random, picture: Picture, keep_names: bool) -> Picture:
    return _other_scene(rng, picture) if isinstance(picture, Scene) else _other_chart(rng, picture, keep_names)


def exchange(rng: Random, picture: Picture, turn: Turn) -> tuple[Picture, str] | None:
    """The picture whose right answer differs most from this one's, with that answer; None if there is none."""
    best: tuple[float, Picture, str] | None = None
    for _ in range(PROPOSALS):
        other = _other(rng, picture, not _is_general(turn))
        found = _asked_there(rng, other, turn)
        if found is None:
            continue
        shared = sum(is_right(f, found.answer) for f in turn.facts) / len(turn.facts)
        if best is None or shared < best[0]:
            best = (shared, other, found.answer)
        if shared == 0:
            break
    return None if best is None or best[0] == 1 else (best[1], best[2])

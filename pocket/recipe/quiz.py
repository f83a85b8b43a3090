"""Many short questions about one picture: what the target learns to see with before it learns to speak at length.

The answers are worded like parts of the long answers, so what is learnt here serves there.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from .ask_charts import head, part
from .phrases import SHORT, Turn
from .spec import PLACES, Chart, Picture, Scene, trend

MAX_QUESTIONS = 8
Pair = tuple[str, str]


def _entry(_: Random, chart: Chart, i: int) -> Pair:
    """Name, colour and value with nothing between: each word is found by a look at what shows the word before it."""
    row = chart.values[i]
    numbers = f"{row[0]} {row[-1]}" if chart.kind == "line" else f"{row[0]}"
    return f"{chart.names[i]}?", f"{chart.names[i]} {chart.colours[i]} {numbers}."


def _spot(rng: Random, scene: Scene, i: int) -> Pair:
    """The same of a scene."""
    thing = scene.things[i]
    return f"{PLACES[thing.place]}?", f"{PLACES[thing.place]} {thing.colour} {thing.size} {thing.shape}."


def _colour(rng: Random, chart: Chart, i: int) -> Pair:
    name, colour, p = chart.names[i], chart.colours[i], part(chart)
    if rng.random() < 0.5:
        question = rng.choice((f"Which colour does {name} have?", f"What is the colour of {name}?",
                               f"In which colour is the {p} of {name} drawn?"))  # fmt: skip
        return question, f"{name} is drawn in {colour}."
    question = rng.choice((f"What does the {colour} {p} stand for?", f"Who is shown in {colour}?",
                           f"Which name belongs to the colour {colour}?"))  # fmt: skip
    return question, f"The {colour} {p} stands for {name}."


def _value(rng: Random, chart: Chart, i: int) -> Pair:
    name = chart.names[i]
    question = rng.choice((f"What is the value of {name}?", f"How much does {name} have?", f"Where does {name} stand?"))
    return question, f"{name} is at {chart.values[i][0]} {chart.unit}."


def _title(rng: Random, chart: Chart, _: int) -> Pair:
    """Says that it wants a short answer: the same question alone asks for the names too (ask_charts.ask_title)."""
    core = rng.choice(("What does the title say?", "What is the chart about?"))
    return f"{core} {rng.choice(SHORT)}", f"{head(chart)}."


def _names(rng: Random, chart: Chart, i: int) -> Pair:
    k = len(chart.names)
    if rng.random() < 0.5:
        p = part(chart)
        return f"Which {p} is number {i + 1}?", f"Number {i + 1} of the {k} {p}s is {chart.names[i]}."
    return "How many names are compared?", f"The chart compares {k} names."


def _extreme(rng: Random, chart: Chart, _: int) -> Pair | None:
    values = [row[0] for row in chart.values]
    word, wanted = rng.choice((("highest", max(values)), ("lowest", min(values))))
    if values.count(wanted) > 1:
        return None
    return f"Which one is the {word}?", f"The {word} is {chart.names[values.index(wanted)]}."


def _end(rng: Random, chart: Chart, i: int) -> Pair:
    name, row = chart.names[i], chart.values[i]
    if rng.random() < 0.5:
        return f"Where does {name} start?", f"{name} starts at {row[0]}."
    return f"Where does {name} end?", f"{name} ends at {row[-1]}."


def _trend(rng: Random, chart: Chart, i: int) -> Pair:
    name, row = chart.names[i], chart.values[i]
    tail = f" by {abs(row[-1] - row[0])}" if row[-1] != row[0] else ""
    return rng.choice((f"Does {name} rise or fall?", f"How does {name} change?")), f"{name} {trend(row)}{tail}."


def _place(rng: Random, scene: Scene, i: int) -> Pair:
    taken = {t.place: t for t in scene.things}
    place = scene.things[i].place if rng.random() < 0.85 else rng.randrange(len(PLACES))
    thing = taken.get(place)
    called = f"a {thing.size} {thing.colour} {thing.shape}" if thing else "nothing"
    question = rng.choice((f"What is at the {PLACES[place]}?", f"Tell me about the {PLACES[place]}."))
    return question, f"At the {PLACES[place]} there is {called}."


def _where(_: Random, scene: Scene, i: int) -> Pair | None:
    thing = scene.things[i]
    if sum((t.colour, t.shape) == (thing.colour, thing.shape) for t in scene.things) > 1:
        return None
    name = f"{thing.colour} {thing.shape}"
    return f"Where is the {name}?", f"The {name} is at the {PLACES[thing.place]}."


def _count(_: Random, scene: Scene, __: int) -> Pair:
    return "How many shapes are there?", f"The picture shows {len(scene.things)} shapes."


Ask = Callable[[Random, Any, int], Pair | None]
BARS: tuple[tuple[Ask, float], ...] = ((_entry, 6), (_colour, 3), (_value, 4), (_title, 1), (_names, 1), (_extreme, 1))
LINES: tuple[tuple[Ask, float], ...] = ((_entry, 6), (_colour, 3), (_end, 4), (_title, 1), (_names, 0.7), (_trend, 2))
SCENES: tuple[tuple[Ask, float], ...] = ((_spot, 6), (_place, 4), (_where, 2), (_count, 0.5))


def _items(picture: Picture) -> int:
    return len(picture.things) if isinstance(picture, Scene) else len(picture.names)


def quiz(rng: Random, picture: Picture, number: int = MAX_QUESTIONS) -> list[Turn]:
    """Up to `number` short questions about a picture; none asks what an earlier answer says."""
    askers = SCENES if isinstance(picture, Scene) else LINES if picture.kind == "line" else BARS
    turns: dict[tuple[Ask, int], Turn] = {}
    for _ in range(3 * number):
        asker, item = rng.choices(askers, [w for _, w in askers])[0][0], rng.randrange(_items(picture))
        asked = asker(rng, picture, item)
        if asked is not None:
            turns.setdefault((asker, item), Turn("quiz", *asked))
        if len(turns) == number:
            break
    return list(turns.values())

"""Scenes of coloured shapes and the questions about them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .facts import Fact, choice, number
from .phrases import Turn, listing, word_question
from .spec import PLACES, SCENE_COLOURS, SHAPES, SIZES, Scene, Thing

COLOURS = tuple(SCENE_COLOURS)
NOTHING = "nothing"


def draw_scene_data(rng: Random) -> Scene:
    """Two to six things at random places; few colours and shapes, so that some occur more than once."""
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(2, 6)))
    colours, shapes = rng.sample(COLOURS, 4), rng.sample(SHAPES, 4)
    things = [Thing(p, rng.choice(shapes), rng.choice(colours), rng.choice(SIZES)) for p in places]
    return Scene(tuple(things))


def _called(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _facts(thing: Thing) -> list[Fact]:
    place = PLACES[thing.place]
    return [choice("size", place, thing.size, SIZES), choice("colour", place, thing.colour, COLOURS),
            choice("shape", place, thing.shape, (*SHAPES, NOTHING))]  # fmt: skip


def ask_scene(rng: Random, scene: Scene) -> Turn:
    """All things."""
    core = rng.choice((
        "Describe this picture in detail.", "What does this picture show?", "Please describe the picture.",
        "What can you see here?", "Tell me what is in the picture and where.", "List all shapes with their places.",
    ))  # fmt: skip
    lines = [f"At the {PLACES[t.place]} there is {_called(t)}." for t in scene.things]
    answer = f"The picture shows {len(scene.things)} shapes on a white ground. " + " ".join(lines)
    facts = [number("count", "shows", len(scene.things))]
    for thing in scene.things:
        facts += _facts(thing)
    return Turn("describe", word_question(rng, core, False), answer, facts)


def ask_place(rng: Random, scene: Scene) -> Turn:
    """What is at one place."""
    empty = [p for p in range(len(PLACES)) if p not in {t.place for t in scene.things}]
    thing = rng.choice(scene.things) if rng.random() < 0.8 else None
    index = thing.place if thing else rng.choice(empty)
    place, short = PLACES[index], rng.random() < 0.15
    core = rng.choice((
        f"What is at the {place}?", f"Which shape do you see at the {place}?", f"Is there anything at the {place}?",
        f"Look at the {place} of the picture. What is there?", f"Tell me about the {place}.",
    ))  # fmt: skip
    answer = f"At the {place} there is {_called(thing) if thing else NOTHING}."
    if not short and thing:
        answer += (
            f" So the shape at this place is a {thing.shape}, its colour is {thing.colour} and it is {thing.size}. "
            f"It is one of {len(scene.things)} shapes in the picture."
        )
    elif not short:
        answer += f" This place is empty, and the {len(scene.things)} shapes of the picture are at other places."
    facts = _facts(thing) if thing else [choice("shape", place, NOTHING, (*SHAPES, NOTHING))]
    return Turn("place", word_question(rng, core, short), answer, facts)


def ask_count(rng: Random, scene: Scene) -> Turn:
    """How many things there are."""
    core = rng.choice((
        "How many shapes are there?", "Count the shapes.", "How many things do you see?",
        "What is the number of shapes in this picture?", "Can you count everything for me?",
    ))  # fmt: skip
    short, k = rng.random() < 0.15, len(scene.things)
    answer = f"The picture shows {k} shapes."
    if not short:
        where = listing([f"the {t.shape} at the {PLACES[t.place]}" for t in scene.things])
        answer += f" I count {where}, which makes {k} in all."
    return Turn("count", word_question(rng, core, short), answer, [number("count", "shows", k)])


def _ask_those(rng: Random, scene: Scene, trait: str, words: tuple[str, ...]) -> Turn:
    """How many things share one trait, and where they are."""
    there = [getattr(t, trait) for t in scene.things]
    wanted = rng.choice(there) if rng.random() < 0.85 else rng.choice(words)
    name = f"{wanted}s" if trait == "shape" else f"{wanted} shapes"
    name = "crosses" if name == "crosss" else name
    core = rng.choice((
        f"How many {name} are there?", f"Count the {name}.", f"Where do you see {name}, and how many?",
        f"Find all {name} in the picture.", f"What is the number of {name}?",
    ))  # fmt: skip
    found = [t for t in scene.things if getattr(t, trait) == wanted]
    if found:
        where = listing([f"{_called(t)} at the {PLACES[t.place]}" for t in found])
        answer = f"Looking for {name}, I find {where}. So the number of {name} is {len(found)}."
    else:
        answer = f"Looking for {name}, I find {NOTHING} at all in the picture. So the number of {name} is 0."
    return Turn(f"count {trait}", word_question(rng, core, False), answer, [number(name, "number of", len(found))])


def ask_colours(rng: Random, scene: Scene) -> Turn:
    """How many things have one colour."""
    return _ask_those(rng, scene, "colour", COLOURS)


def ask_shapes(rng: Random, scene: Scene) -> Turn:
    """How many things have one shape."""
    return _ask_those(rng, scene, "shape", SHAPES)


def ask_where(rng: Random, scene: Scene) -> Turn | None:
    """The place of a thing which colour and shape single out."""
    seen = [(t.colour, t.shape) for t in scene.things]
    single = [t for t in scene.things if seen.count((t.colour, t.shape)) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    name, short = f"{thing.colour} {thing.shape}", rng.random() < 0.15
    core = rng.choice((
        f"Where is the {name}?", f"At which place do you see the {name}?", f"I cannot find the {name}. Where is it?",
        f"In which part of the picture is the {name}?", f"Find the {name}, please.",
    ))  # fmt: skip
    answer = f"The {name} is at the {PLACES[thing.place]}."
    if not short:
        answer += (
            f" It is {thing.size}, and it is one of {len(scene.things)} shapes in the picture. "
            f"I found it by its colour, which is {thing.colour}, and by its shape."
        )
    return Turn("where", word_question(rng, core, short), answer, [choice("place", name, PLACES[thing.place], PLACES)])


SceneAsker = Callable[[Random, Scene], Turn | None]
SCENE_ASKERS: tuple[tuple[SceneAsker, float], ...] = (
    (ask_scene, 5), (ask_place, 2), (ask_count, 0.7), (ask_colours, 1), (ask_shapes, 1), (ask_where, 1.5),
)  # fmt: skip

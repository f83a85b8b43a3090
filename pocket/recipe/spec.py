"""What a picture shows, as plain data; what its parts mean, as short statements "role word"; and the split of pictures
into training and held-out ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

HELDOUT_SHARE = 16  # one picture in so many is held out

CHART_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "blue": (30, 60, 220),
    "green": (20, 150, 50),
    "orange": (255, 150, 0),
    "purple": (150, 40, 170),
    "black": (20, 20, 20),
}
SCENE_COLOURS: dict[str, tuple[int, int, int]] = {
    **CHART_COLOURS,
    "yellow": (240, 215, 0),
    "pink": (255, 120, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = ("small", "large")
PLACES = (
    "top left", "top centre", "top right",
    "middle left", "middle centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
LEVELS = 20  # grid steps on a value axis


@dataclass(frozen=True)
class Chart:
    """A chart of a real table; `values[i]` belongs to `names[i]` (one value, or one a point for lines)."""

    kind: str  # hbar, vbar, pie or line
    field: str
    period: str
    unit: str
    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    colours: tuple[str, ...]
    axis: int = 100
    points: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The distance of two grid steps, which is also the tolerance of a value read off."""
        return max(1, self.axis // LEVELS)

    def key(self) -> str:
        """The data of the picture, whatever its order and colours."""
        return "|".join((self.kind[-3:], self.field, self.period, ",".join(sorted(self.names))))


@dataclass(frozen=True)
class Thing:
    """One coloured shape of a scene; `place` indexes PLACES."""

    place: int
    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """A white square with coloured shapes in a grid of three by three places."""

    things: tuple[Thing, ...]
    kind: str = "scene"

    def key(self) -> str:
        """The things and their places."""
        return "|".join(sorted(f"{t.place}{t.shape}{t.colour}{t.size}" for t in self.things))


Picture = Chart | Scene


def is_heldout(picture: Picture) -> bool:
    """True for the pictures which no training run may see; decided by the picture's data alone."""
    digest = hashlib.sha256(picture.key().encode()).digest()
    return digest[0] % HELDOUT_SHARE == 0


SPOKEN = ("name", "colour", "value", "start", "end", "shape", "size", "place")
"""Roles whose words an answer repeats."""


def trend(row: tuple[int, ...]) -> str:
    """How a line runs from its first to its last point."""
    change = row[-1] - row[0]
    return "rises" if change > 0 else "falls" if change < 0 else "stays level"


def of_entry(chart: Chart, i: int) -> tuple[str, ...]:
    """Of one bar, slice or line."""
    row, column = chart.values[i], [r[0] for r in chart.values]
    said = [f"name {chart.names[i]}", f"colour {chart.colours[i]}", f"order {i + 1}"]
    if chart.kind == "line":
        return (*said, f"start {row[0]}", f"end {row[-1]}", f"trend {trend(row)}")
    said.append(f"value {row[0]}")
    said += ["rank highest"] * (row[0] == max(column)) + ["rank lowest"] * (row[0] == min(column))
    return tuple(said)


def of_thing(thing: Thing) -> tuple[str, ...]:
    """Of one shape of a scene."""
    return f"size {thing.size}", f"colour {thing.colour}", f"shape {thing.shape}", f"place {PLACES[thing.place]}"


def of_picture(picture: Chart | Scene) -> tuple[str, ...]:
    """Of the whole."""
    return f"kind {picture.kind}", f"count {len(picture.things if isinstance(picture, Scene) else picture.names)}"


def spoken(said: tuple[str, ...]) -> list[str]:
    """The words of a part that answers repeat."""
    return [word for role, word in (statement.split(" ", 1) for statement in said) if role in SPOKEN]

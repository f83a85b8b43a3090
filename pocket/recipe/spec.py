"""What a picture shows, as plain data, and the split of pictures into training and held-out ones."""

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

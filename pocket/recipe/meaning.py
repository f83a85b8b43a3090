"""What the parts of a picture mean, as short statements "role word": what a look at a part should tell at once."""

from __future__ import annotations

from .spec import PLACES, Chart, Scene, Thing

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

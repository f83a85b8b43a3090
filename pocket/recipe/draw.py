"""Pictures drawn with PIL: every element sits on a grid of 16 pixels, the patch size of the vision tower.

What is written and what each part means is noted while drawing, for the training of the vision tower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .spec import CHART_COLOURS, LEVELS, SCENE_COLOURS, Chart, Picture, Scene, Thing, of_entry, of_picture, of_thing

SIDE = 160
ROW = 16
INK = (0, 0, 0)
PALE = (205, 205, 205)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The lettering of all pictures."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


@dataclass(frozen=True)
class Note:
    """What a box of the picture (left, top, right, bottom) shows.

    `text` is written there in a font of `size` (0 and nothing for a mark); `said` is what the part means.
    """

    box: tuple[float, float, float, float]
    said: tuple[str, ...] = ()
    text: str = ""
    size: int = 0


@dataclass
class Sketch:
    """A picture in the making."""

    image: Image.Image
    pen: ImageDraw.ImageDraw
    notes: list[Note] = field(default_factory=list)

    def write(
        self, x: int, row_y: int, text: str, size: int = 11, anchor: str = "lm", said: tuple[str, ...] = ()
    ) -> None:
        """Text centred in the row of 16 pixels which starts at row_y."""
        self.pen.text((x, row_y + ROW // 2), text, fill=INK, font=font(size), anchor=anchor)
        width = font(size).getlength(text)
        left = x - {"l": 0.0, "m": width / 2, "r": width}[anchor[0]]
        self.notes.append(Note((left, row_y, left + width, row_y + ROW), said, text, size))

    def mean(self, box: tuple[float, float, float, float], said: tuple[str, ...]) -> None:
        """Note what the mark in a box means."""
        self.notes.append(Note(box, said))


def _sketch(width: int, height: int) -> Sketch:
    image = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    pen.fontmode = "L"
    return Sketch(image, pen)


def _title(sketch: Sketch, chart: Chart) -> None:
    sketch.write(2, 0, chart.field)
    if chart.kind != "line":
        sketch.write(128, 0, chart.period)


def _legend(sketch: Sketch, chart: Chart, top: int) -> None:
    """Names beside a patch of their colour, in two columns."""
    for i, (name, colour) in enumerate(zip(chart.names, chart.colours, strict=True)):
        x, y = 80 * (i % 2), top + ROW * (i // 2)
        sketch.pen.rectangle((x + 2, y + 3, x + 12, y + 13), fill=CHART_COLOURS[colour])
        sketch.write(x + 16, y, name, said=of_entry(chart, i))


def draw_hbar(chart: Chart) -> Sketch:
    """Horizontal bars, named at their left; 160 x 128 pixels."""
    sketch = _sketch(SIDE, 128)
    pen = sketch.pen
    _title(sketch, chart)
    for i in range(5):
        x = 72 + 20 * i
        pen.line((x, 16, x, 98), fill=INK if i == 0 else PALE)
    for i, (name, row, colour) in enumerate(zip(chart.names, chart.values, chart.colours, strict=True)):
        y = 16 + ROW * i
        sketch.write(2, y, name, said=of_entry(chart, i))
        tip = 72 + 4 * row[0] * LEVELS // chart.axis
        pen.rectangle((73, y + 3, tip, y + 13), fill=CHART_COLOURS[colour])
        sketch.mean((tip - 4, y, tip, y + ROW), of_entry(chart, i))
    for i, tick in enumerate((0, chart.axis // 2, chart.axis)):
        sketch.write(72 + 40 * i, 96, str(tick), 10, "mm")
    sketch.write(2, 112, chart.unit)
    return sketch


def _value_axis(sketch: Sketch, chart: Chart) -> None:
    """The value axis of upright charts: 80 pixels from y = 104 up to y = 24."""
    for i in range(5):
        y = 104 - 20 * i
        sketch.pen.line((30, y, 158, y), fill=INK if i == 0 else PALE)
    for i, tick in enumerate((0, chart.axis // 2, chart.axis)):
        sketch.write(28, 96 - 40 * i, str(tick), 10, "rm")


def draw_vbar(chart: Chart) -> Sketch:
    """Upright bars with a legend below; 160 x 160 pixels."""
    sketch = _sketch(SIDE, SIDE)
    pen = sketch.pen
    _title(sketch, chart)
    _value_axis(sketch, chart)
    for i, (row, colour) in enumerate(zip(chart.values, chart.colours, strict=True)):
        x = 34 + 25 * i
        tip = 104 - 4 * row[0] * LEVELS // chart.axis
        pen.rectangle((x, tip, x + 16, 104), fill=CHART_COLOURS[colour])
        sketch.mean((x, tip, x + 16, tip + 4), of_entry(chart, i))
    _legend(sketch, chart, 112)
    return sketch


def draw_line(chart: Chart) -> Sketch:
    """Lines with markers, the first and last point named below, and a legend; 160 x 160 pixels."""
    sketch = _sketch(SIDE, SIDE)
    pen = sketch.pen
    _title(sketch, chart)
    _value_axis(sketch, chart)
    for entry, (row, colour) in enumerate(zip(chart.values, chart.colours, strict=True)):
        dots = [(40 + 36 * i, 104 - 4 * v * LEVELS // chart.axis) for i, v in enumerate(row)]
        pen.line(dots, fill=CHART_COLOURS[colour], width=2)
        for x, y in dots:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=CHART_COLOURS[colour])
        for x, y in (dots[0], dots[-1]):
            sketch.mean((x - 3, y - 3, x + 3, y + 3), of_entry(chart, entry))
    sketch.write(40, 111, chart.points[0], 10, "mm")
    sketch.write(144, 111, chart.points[-1], 10, "mm")
    _legend(sketch, chart, 128)
    return sketch


def draw_pie(chart: Chart) -> Sketch:
    """A pie with a legend that gives name and share; 128 x 160 pixels."""
    sketch = _sketch(128, SIDE)
    pen = sketch.pen
    sketch.write(2, 0, chart.field)
    sketch.write(96, 0, chart.period)
    angle = -90.0
    for i, (row, colour) in enumerate(zip(chart.values, chart.colours, strict=True)):
        sweep = 3.6 * row[0]
        pen.pieslice((34, 18, 94, 78), angle, angle + sweep, fill=CHART_COLOURS[colour], outline=(255, 255, 255))
        angle += sweep
        y = 80 + ROW * i
        pen.rectangle((2, y + 3, 12, y + 13), fill=CHART_COLOURS[colour])
        sketch.write(18, y, chart.names[i], said=of_entry(chart, i))
        sketch.write(96, y, f"{row[0]}%", said=of_entry(chart, i))
    return sketch


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The corners of a shape around a centre."""
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    if shape == "star":
        turns = [(r if k % 2 == 0 else 0.42 * r, math.pi * k / 5 - math.pi / 2) for k in range(10)]
        return [(x + d * math.cos(a), y + d * math.sin(a)) for d, a in turns]
    t = r / 3
    return [(x - t, y - r), (x + t, y - r), (x + t, y - t), (x + r, y - t), (x + r, y + t), (x + t, y + t),
            (x + t, y + r), (x - t, y + r), (x - t, y + t), (x - r, y + t), (x - r, y - t), (x - t, y - t)]  # fmt: skip


def _draw_thing(sketch: Sketch, thing: Thing) -> None:
    x, y = 32 + 48 * (thing.place % 3), 32 + 48 * (thing.place // 3)
    r = 20 if thing.size == "large" else 10
    fill = SCENE_COLOURS[thing.colour]
    if thing.shape == "circle":
        sketch.pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        sketch.pen.polygon(_polygon(thing.shape, x, y, r), fill=fill)
    sketch.mean((x - r, y - r, x + r, y + r), of_thing(thing))


def draw_scene(scene: Scene) -> Sketch:
    """Coloured shapes on white; 160 x 160 pixels."""
    sketch = _sketch(SIDE, SIDE)
    for thing in scene.things:
        _draw_thing(sketch, thing)
    return sketch


_CHARTS = {"hbar": draw_hbar, "vbar": draw_vbar, "line": draw_line, "pie": draw_pie}


def sketch_of(picture: Picture) -> Sketch:
    """The picture with the notes of what it shows; those of the whole are in its first corner."""
    sketch = draw_scene(picture) if isinstance(picture, Scene) else _CHARTS[picture.kind](picture)
    sketch.mean((0, 0, ROW, ROW), of_picture(picture))
    return sketch


def draw(picture: Picture) -> Image.Image:
    """The picture as an RGB image of 160 x 160 pixels or less."""
    return sketch_of(picture).image

"""Pictures drawn with PIL: every element sits on a grid of 16 pixels, the patch size of the vision tower."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .spec import CHART_COLOURS, LEVELS, SCENE_COLOURS, Chart, Picture, Scene, Thing

SIDE = 160
ROW = 16
INK = (0, 0, 0)
PALE = (205, 205, 205)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _text(pen: ImageDraw.ImageDraw, x: int, row_y: int, text: str, size: int = 11, anchor: str = "lm") -> None:
    """Text centred in the row of 16 pixels which starts at row_y."""
    pen.text((x, row_y + ROW // 2), text, fill=INK, font=_font(size), anchor=anchor)


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    pen.fontmode = "L"
    return image, pen


def _title(pen: ImageDraw.ImageDraw, chart: Chart) -> None:
    _text(pen, 2, 0, chart.field)
    if chart.kind != "line":
        _text(pen, 128, 0, chart.period)


def _legend(pen: ImageDraw.ImageDraw, chart: Chart, top: int) -> None:
    """Names beside a patch of their colour, in two columns."""
    for i, (name, colour) in enumerate(zip(chart.names, chart.colours, strict=True)):
        x, y = 80 * (i % 2), top + ROW * (i // 2)
        pen.rectangle((x + 2, y + 3, x + 12, y + 13), fill=CHART_COLOURS[colour])
        _text(pen, x + 16, y, name)


def draw_hbar(chart: Chart) -> Image.Image:
    """Horizontal bars, named at their left; 160 x 128 pixels."""
    image, pen = _canvas(SIDE, 128)
    _title(pen, chart)
    for i in range(5):
        x = 72 + 20 * i
        pen.line((x, 16, x, 98), fill=INK if i == 0 else PALE)
    for i, (name, row, colour) in enumerate(zip(chart.names, chart.values, chart.colours, strict=True)):
        y = 16 + ROW * i
        _text(pen, 2, y, name)
        pen.rectangle((73, y + 3, 72 + 4 * row[0] * LEVELS // chart.axis, y + 13), fill=CHART_COLOURS[colour])
    for i, tick in enumerate((0, chart.axis // 2, chart.axis)):
        _text(pen, 72 + 40 * i, 96, str(tick), 10, "mm")
    _text(pen, 2, 112, chart.unit)
    return image


def _value_axis(pen: ImageDraw.ImageDraw, chart: Chart) -> None:
    """The value axis of upright charts: 80 pixels from y = 104 up to y = 24."""
    for i in range(5):
        y = 104 - 20 * i
        pen.line((30, y, 158, y), fill=INK if i == 0 else PALE)
    for i, tick in enumerate((0, chart.axis // 2, chart.axis)):
        _text(pen, 28, 96 - 40 * i, str(tick), 10, "rm")


def draw_vbar(chart: Chart) -> Image.Image:
    """Upright bars with a legend below; 160 x 160 pixels."""
    image, pen = _canvas(SIDE, SIDE)
    _title(pen, chart)
    _value_axis(pen, chart)
    for i, (row, colour) in enumerate(zip(chart.values, chart.colours, strict=True)):
        x = 34 + 25 * i
        pen.rectangle((x, 104 - 4 * row[0] * LEVELS // chart.axis, x + 16, 104), fill=CHART_COLOURS[colour])
    _legend(pen, chart, 112)
    return image


def draw_line(chart: Chart) -> Image.Image:
    """Lines with markers, the first and last point named below, and a legend; 160 x 160 pixels."""
    image, pen = _canvas(SIDE, SIDE)
    _title(pen, chart)
    _value_axis(pen, chart)
    for row, colour in zip(chart.values, chart.colours, strict=True):
        dots = [(40 + 36 * i, 104 - 4 * v * LEVELS // chart.axis) for i, v in enumerate(row)]
        pen.line(dots, fill=CHART_COLOURS[colour], width=2)
        for x, y in dots:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=CHART_COLOURS[colour])
    _text(pen, 40, 111, chart.points[0], 10, "mm")
    _text(pen, 144, 111, chart.points[-1], 10, "mm")
    _legend(pen, chart, 128)
    return image


def draw_pie(chart: Chart) -> Image.Image:
    """A pie with a legend that gives name and share; 128 x 160 pixels."""
    image, pen = _canvas(128, SIDE)
    pen.text((2, 8), chart.field, fill=INK, font=_font(11), anchor="lm")
    pen.text((96, 8), chart.period, fill=INK, font=_font(11), anchor="lm")
    angle = -90.0
    for i, (row, colour) in enumerate(zip(chart.values, chart.colours, strict=True)):
        sweep = 3.6 * row[0]
        pen.pieslice((34, 18, 94, 78), angle, angle + sweep, fill=CHART_COLOURS[colour], outline=(255, 255, 255))
        angle += sweep
        y = 80 + ROW * i
        pen.rectangle((2, y + 3, 12, y + 13), fill=CHART_COLOURS[colour])
        _text(pen, 18, y, chart.names[i])
        _text(pen, 96, y, f"{row[0]}%")
    return image


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


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y = 32 + 48 * (thing.place % 3), 32 + 48 * (thing.place // 3)
    r = 20 if thing.size == "large" else 10
    fill = SCENE_COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        pen.polygon(_polygon(thing.shape, x, y, r), fill=fill)


def draw_scene(scene: Scene) -> Image.Image:
    """Coloured shapes on white; 160 x 160 pixels."""
    image, pen = _canvas(SIDE, SIDE)
    for thing in scene.things:
        _draw_thing(pen, thing)
    return image


_CHARTS = {"hbar": draw_hbar, "vbar": draw_vbar, "line": draw_line, "pie": draw_pie}


def draw(picture: Picture) -> Image.Image:
    """The picture as an RGB image of 160 x 160 pixels or less."""
    return draw_scene(picture) if isinstance(picture, Scene) else _CHARTS[picture.kind](picture)

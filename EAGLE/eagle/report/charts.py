"""Small charts as SVG inside a page. Colours come from the page's style, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from eagle.report.intervals import Interval

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 40
LABEL = 60
"""Characters of a label at most."""


def nice_steps(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from below ``low`` to above ``high``.

    >>> nice_steps(0, 0.93)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if high <= low:  # all values are equal
        low, high = low - 0.1 * abs(low or 1.0), high + 0.1 * abs(high or 1.0)
    span = (high - low) / count
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


class Axes:
    """The frame of a chart, and where a value lies in it."""

    def __init__(self, xs: tuple[float, float], ys: Sequence[float], x_label: str, y_label: str) -> None:
        self.ticks = nice_steps(min(ys), max(ys))
        self.x_low, self.x_high = xs[0], max(xs[1], xs[0] + 1e-9)
        self.parts = [text(LEFT + self.width / 2, HEIGHT - 4, x_label, "middle")]
        self.parts.append(f'<text transform="translate(10 {TOP + self.height / 2}) rotate(-90)" '
                          f'text-anchor="middle">{escape(y_label)}</text>')  # fmt: skip
        for tick in self.ticks:
            self.parts.append(line(LEFT, self.y(tick), WIDTH - RIGHT, self.y(tick), "grid"))
            self.parts.append(text(LEFT - 5, self.y(tick) + 4, f"{tick:g}", "end"))

    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(self, value: float) -> float:
        return LEFT + self.width * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return TOP + self.height * (1 - (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0]))

    def label_x(self, value: float, label: str) -> None:
        self.parts.append(text(self.x(value), HEIGHT - BOTTOM + 15, label, "middle"))


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def circle(kind: str, x: float, y: float, radius: float, title: str) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
    return f'<circle class="{kind}" {place}><title>{escape(title)}</title></circle>'


def figure(title: str, parts: Sequence[str], note: str = "", height: float = HEIGHT) -> str:
    """A chart with its caption."""
    under = f"<p>{escape(note)}</p>" if note else ""
    drawing = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}{under}</figure>"


def columns(title: str, values: Sequence[float], x_label: str, y_label: str, first: int = 0, note: str = "") -> str:
    """A column for each value; they are numbered from ``first`` on."""
    axes = Axes((-0.5, len(values) - 0.5), (0, *values), x_label, y_label)
    step = axes.width / max(len(values), 1)
    every = max(1, math.ceil(len(values) / 16))
    for number, value in enumerate(values):
        top = axes.y(value)
        axes.parts.append(
            f'<rect class="bar" x="{axes.x(number) - 0.4 * step:.1f}" y="{top:.1f}" width="{0.8 * step:.1f}" '
            f'height="{axes.y(0) - top:.1f}"><title>{number + first}: {value:.4g}</title></rect>'
        )
        if number % every == 0:
            axes.label_x(number, str(number + first))
    return figure(title, axes.parts, note)


def points(
    title: str, places: Sequence[tuple[float, float, str]], x_label: str, y_label: str, level: float, note: str = ""
) -> str:
    """A point (x, y, name) each; those below ``level`` stand out."""
    xs = [x for x, _, _ in places]
    ticks = nice_steps(min(xs), max(xs))
    axes = Axes((ticks[0], ticks[-1]), (0, level, *(y for _, y, _ in places)), x_label, y_label)
    for tick in ticks:
        axes.label_x(tick, f"{tick:g}")
    axes.parts.append(line(LEFT, axes.y(level), WIDTH - RIGHT, axes.y(level), "level"))
    for x, y, name in places:
        kind = "loss" if y < level else "dot"
        axes.parts.append(circle(kind, axes.x(x), axes.y(y), 3.5, f"{name}: {x:.4g}, {y:.4g}"))
    return figure(title, axes.parts, note)


def lines(title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_label: str, y_label: str) -> str:
    """A line for each (name, points)."""
    series = [(name, part) for name, part in series if part]
    everything = [point for _, part in series for point in part]
    xs = [x for x, _ in everything]
    axes = Axes((min(xs), max(xs)), (0, *(y for _, y in everything)), x_label, y_label)
    for value in sorted({min(xs), max(xs)}):
        axes.parts.append(
            text(axes.x(value), HEIGHT - BOTTOM + 15, f"{value:g}", "start" if value == min(xs) else "end")
        )
    for number, (_, part) in enumerate(series):
        places = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in part)
        axes.parts.append(f'<polyline class="s{number % 4}" points="{places}"/>')
        if len(part) < 30:
            kind = f"s{number % 4}"
            axes.parts += [circle(kind, axes.x(x), axes.y(y), 2.5, f"{x:g}: {y:.4g}") for x, y in part]
    legend = "".join(f'<i class="k{number % 4}"></i>{escape(name)} ' for number, (name, _) in enumerate(series))
    return figure(title, axes.parts).replace("</figure>", f'<p class="key">{legend}</p></figure>')


def intervals(title: str, rows: Sequence[tuple[str, Interval]], note: str = "") -> str:
    """A figure with its interval on each line, all on one scale."""
    top, step = 4, 34
    bottom = top + step * len(rows)
    ends = [end for _, each in rows for end in (each.low, each.high, each.value) if end is not None]
    ticks = nice_steps(min(0.0, *ends) if min(ends) < 0.6 * max(ends) else min(ends), max(ends))

    def x(value: float) -> float:
        return 12 + (WIDTH - 24) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [line(x(tick), top, x(tick), bottom, "grid") for tick in ticks]
    parts += [text(x(tick), bottom + 14, f"{tick:g}", "middle") for tick in ticks]
    for number, (name, each) in enumerate(rows):
        y = top + step * number + 25
        short = name if len(name) <= LABEL else name[: LABEL - 1] + "…"
        parts.append(text(2, y - 11, short, "start"))
        if each.low is not None and each.high is not None:
            parts.append(line(x(each.low), y, x(each.high), y, "range"))
        parts.append(circle("dot", x(each.value), y, 4, f"{name}: {each.value:.4g}"))
    return figure(title, parts, note, bottom + 20)

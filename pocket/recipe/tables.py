"""Charts from real tables which Python packages ship.

gapminder (package `gapminder`; data of the Gapminder Foundation, CC-BY): countries.
vega_datasets (package MIT, data BSD-3): us-employment (US Bureau of Labor Statistics), iowa-electricity
(US Energy Information Administration), stocks, barley (Immer 1934), seattle-weather (NOAA), wheat (Playfair 1822).

Values are snapped to a grid of LEVELS steps so that they can be read off a small picture.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

from .spec import CHART_COLOURS, LEVELS, Chart

AXES = (20, 40, 100)
COUNTRIES = (
    "Angola", "Austria", "Belgium", "Bolivia", "Brazil", "Canada", "Chile", "Cuba", "Denmark", "Egypt", "Ethiopia",
    "Finland", "France", "Germany", "Ghana", "Greece", "Haiti", "Hungary", "Iceland", "India", "Iraq", "Ireland",
    "Israel", "Italy", "Japan", "Kenya", "Malaysia", "Mexico", "Morocco", "Nepal", "Norway", "Peru", "Poland",
    "Portugal", "Senegal", "Spain", "Sudan", "Sweden", "Turkey", "Uganda", "Vietnam", "Zambia",
)  # fmt: skip
SECTORS = {
    "mining_and_logging": "Mining", "construction": "Building", "manufacturing": "Factories",
    "retail_trade": "Retail", "wholesale_trade": "Wholesale", "utilities": "Utilities",
    "transportation_and_warehousing": "Transport", "financial_activities": "Finance",
    "education_and_health_services": "Health", "leisure_and_hospitality": "Leisure",
    "government": "State", "information": "Media",
}  # fmt: skip
STOCKS = {"MSFT": "Microsoft", "AAPL": "Apple", "AMZN": "Amazon", "IBM": "IBM", "GOOG": "Google"}
SOURCES = {"Fossil Fuels": "Fossil", "Nuclear Energy": "Nuclear", "Renewables": "Renewable"}
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August",
    "September", "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Numbers of one field: `rows[name][period]`, in `unit`."""

    field: str
    unit: str
    rows: dict[str, dict[str, float]]
    weight: float
    kinds: tuple[str, ...]


def _package_file(package: str, name: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"package {package} is missing: pip install {package}")
    return Path(found.origin).parent / name


def _rows(package: str, name: str) -> list[dict[str, str]]:
    path = _package_file(package, name)
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))


def _mean(items: list[tuple[str, str, float]]) -> dict[str, dict[str, float]]:
    """The mean of (name, period, number) for each name and period."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, period, number in items:
        sums[name, period].append(number)
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, period), numbers in sums.items():
        out[name][period] = sum(numbers) / len(numbers)
    return dict(out)


def _gapminder(column: str, divisor: float) -> dict[str, dict[str, float]]:
    rows = _rows("gapminder", "gapminder.csv")
    return _mean([(r["country"], r["year"], float(r[column]) / divisor) for r in rows if r["country"] in COUNTRIES])


def _employment() -> dict[str, dict[str, float]]:
    rows = _rows("vega_datasets", "_data/us-employment.csv")
    return _mean([(n, r["month"][:4], float(r[c]) / 1000) for r in rows for c, n in SECTORS.items()])


def _stocks() -> dict[str, dict[str, float]]:
    rows = _rows("vega_datasets", "_data/stocks.csv")
    return _mean([(STOCKS[r["symbol"]], r["date"].split()[-1], float(r["price"])) for r in rows])


def _electricity() -> dict[str, dict[str, float]]:
    rows = _rows("vega_datasets", "_data/iowa-electricity.csv")
    return _mean([(SOURCES[r["source"]], r["year"][:4], float(r["net_generation"]) / 1000) for r in rows])


def _barley() -> dict[str, dict[str, float]]:
    rows = _rows("vega_datasets", "_data/barley.json")
    short = {"Grand Rapids": "Rapids", "University Farm": "Farm"}
    return _mean([(short.get(r["site"], r["site"]), str(r["year"]), float(r["yield"])) for r in rows])


def _weather(column: str) -> dict[str, dict[str, float]]:
    rows = _rows("vega_datasets", "_data/seattle-weather.csv")
    days = [(datetime.strptime(r["date"], "%Y/%m/%d"), float(r[column])) for r in rows]
    return _mean([(MONTHS[d.month - 1], str(d.year), number) for d, number in days])


def _sky() -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for r in _rows("vega_datasets", "_data/seattle-weather.csv"):
        out[r["weather"].capitalize()][r["date"][:4]] += 1
    return {name: dict(days) for name, days in out.items()}


def _wheat() -> dict[str, dict[str, float]]:
    rows = _rows("vega_datasets", "_data/wheat.json")
    return _mean([(n.capitalize(), str(r["year"]), float(r[n])) for r in rows for n in ("wheat", "wages") if n in r])


@cache
def tables() -> tuple[Table, ...]:
    """All tables, loaded once."""
    bars, every = ("hbar", "vbar"), ("hbar", "vbar", "line", "pie")
    return (
        Table("Life expectancy", "years", _gapminder("lifeExp", 1), 3, ("hbar", "vbar", "line")),
        Table("Income", "thousand dollars", _gapminder("gdpPercap", 1000), 3, ("hbar", "vbar", "line")),
        Table("Population", "million people", _gapminder("pop", 1e6), 4, every),
        Table("Jobs", "million jobs", _employment(), 3, ("hbar", "vbar", "pie")),
        Table("Stock price", "dollars", _stocks(), 1, ("hbar", "vbar", "line")),
        Table("Iowa power", "terawatt hours", _electricity(), 0.7, ("line", "pie")),
        Table("Barley yield", "bushels", _barley(), 0.6, bars),
        Table("Seattle heat", "degrees", _weather("temp_max"), 1, bars),
        Table("Seattle sky", "percent of days", _sky(), 0.5, ("pie",)),
        Table("Old prices", "shillings", _wheat(), 0.5, ("line",)),
    )


FIELDS = (
    "Life expectancy", "Income", "Population", "Jobs", "Stock price", "Iowa power", "Barley yield", "Seattle heat",
    "Seattle sky", "Old prices",
)  # fmt: skip


def _colours(rng: Random, number: int) -> tuple[str, ...]:
    return tuple(rng.sample(list(CHART_COLOURS), number))


def _snap(numbers: list[list[float]]) -> tuple[int, list[list[int]]] | None:
    """The smallest axis which holds all numbers and the numbers on its grid, or None if they do not fit."""
    top = max(max(row) for row in numbers)
    for axis in AXES:
        if top <= axis:
            step = axis // LEVELS
            snapped = [[round(n / step) * step for n in row] for row in numbers]
            return (axis, snapped) if min(min(row) for row in snapped) >= step else None
    return None


def _shares(numbers: list[float]) -> list[int] | None:
    """Shares in percent on a grid of 5 which add up to 100, or None if one would vanish."""
    total = sum(numbers)
    exact = [20 * n / total for n in numbers]
    whole = [int(e) for e in exact]
    for i in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])[: 20 - sum(whole)]:
        whole[i] += 1
    return [5 * w for w in whole] if min(whole) >= 1 else None


def _bars(rng: Random, table: Table, kind: str) -> Chart | None:
    period = rng.choice(sorted({p for row in table.rows.values() for p in row}))
    known = sorted(n for n, row in table.rows.items() if period in row)
    count = rng.randint(3, 5)
    if len(known) < count:
        return None
    names = tuple(rng.sample(known, count))
    numbers = [[table.rows[n][period]] for n in names]
    fit = _snap(numbers)
    if fit is None:
        return None
    values = tuple(tuple(v) for v in fit[1])
    return Chart(kind, table.field, period, table.unit, names, values, _colours(rng, count), fit[0])


def _pie(rng: Random, table: Table, kind: str) -> Chart | None:
    period = rng.choice(sorted({p for row in table.rows.values() for p in row}))
    known = sorted(n for n, row in table.rows.items() if period in row)
    count = rng.randint(3, min(5, len(known)))
    names = tuple(rng.sample(known, count))
    shares = _shares([table.rows[n][period] for n in names])
    if shares is None:
        return None
    values = tuple((s,) for s in shares)
    return Chart(kind, table.field, period, "percent", names, values, _colours(rng, count))


def _too_close(numbers: list[int], axis: int) -> bool:
    """True if markers at these values would cover each other."""
    ranked = sorted(numbers)
    return any(b - a < 2 * axis // LEVELS for a, b in pairwise(ranked))


def _line(rng: Random, table: Table, kind: str) -> Chart | None:
    count = rng.randint(2, min(3, len(table.rows)))
    names = tuple(rng.sample(sorted(table.rows), count))
    shared = sorted(set.intersection(*(set(table.rows[n]) for n in names)))
    length = 4
    stride = rng.choice((1, 2, 3))
    if len(shared) < (length - 1) * stride + 1:
        return None
    start = rng.randrange(len(shared) - (length - 1) * stride)
    points = tuple(shared[start + i * stride] for i in range(length))
    fit = _snap([[table.rows[n][p] for p in points] for n in names])
    if fit is None:
        return None
    values = tuple(tuple(v) for v in fit[1])
    if any(_too_close([row[i] for row in values], fit[0]) for i in range(length)):
        return None
    period = f"{points[0]} to {points[-1]}"
    return Chart(kind, table.field, period, table.unit, names, values, _colours(rng, count), fit[0], points)


_MAKERS: dict[str, Callable[[Random, Table, str], Chart | None]] = {
    "hbar": _bars, "vbar": _bars, "pie": _pie, "line": _line,
}  # fmt: skip


def draw_chart_data(rng: Random, kind: str) -> Chart:
    """A random chart of the wanted kind from one of the tables that suit it."""
    fitting = [t for t in tables() if kind in t.kinds]
    while True:
        table = rng.choices(fitting, [t.weight for t in fitting])[0]
        chart = _MAKERS[kind](rng, table, kind)
        if chart is not None:
            return chart

"""Runs side by side: their figures, the settings that differ, and which differences are larger than the spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eagle.published import Published
from eagle.report import charts, markdown_table, page
from eagle.report.intervals import Interval
from eagle.report.runs import FIRST, PLAIN, SPEED, Row, Run, pairs_of
from llava.files import write_text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HIGHER, LOWER, WITHIN, UNKNOWN, EQUAL = "higher", "lower", "within the spread", "spread unknown", "equal"
REAL = (HIGHER, LOWER)
NOT_COMPARED = ("commit", "date")
"""Settings that two runs need not share: they are listed, but explain no difference."""
NOTE = (
    "A difference counts as real only if the 95 % intervals of both runs do not overlap. Without a recorded spread "
    "nothing is said of it."
)


@dataclass(frozen=True)
class Comparison:
    """One figure of two runs. ``rows``: which row of each."""

    runs: tuple[str, str]
    rows: tuple[str, str]
    measure: str
    first: Interval
    other: Interval

    @property
    def verdict(self) -> str:
        """Of ``other`` against ``first``."""
        if self.first.value == self.other.value:
            return EQUAL
        overlaps = self.first.overlaps(self.other)
        if overlaps is None:
            return UNKNOWN
        return WITHIN if overlaps else HIGHER if self.other.value > self.first.value else LOWER


def name_of(row: Row) -> str:
    return f"{row.part}, {row.way}"


def labels(runs: Sequence[Run]) -> list[str]:
    """A, B, C, …; numbers after Z."""
    return [LETTERS[number] if number < len(LETTERS) else str(number + 1) for number in range(len(runs))]


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Every run against the first one; a single training run's evaluations against its first evaluation."""
    names, first = labels(runs), runs[0]
    pairs = [
        (names[0], names[n], one, other) for n, run in enumerate(runs[1:], 1) for one, other in pairs_of(first, run)
    ]
    if len(runs) == 1 and first.kind == "training":
        pairs = [(names[0], names[0], first.rows[-1], row) for row in first.rows[:-1]]
    return [
        Comparison((a, b), (name_of(one), name_of(other)), measure, figure, other.figures[measure])
        for a, b, one, other in pairs
        for measure, figure in one.figures.items()
        if measure in other.figures
    ]


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings in which the runs differ, with the value of each; empty where a run did not record it."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name, "") for run in runs] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def shared(runs: Sequence[Run]) -> dict[str, str]:
    """Settings that all runs share."""
    return {name: value for name, value in runs[0].settings.items() if all(r.settings.get(name) == value for r in runs)}


def number(figure: Interval) -> str:
    """
    >>> number(Interval(2.0, 1.5, 2.5)), number(Interval(123.4))
    ('2.00 [1.50, 2.50]', '123.4')
    """
    places = 1 if abs(figure.value) >= 100 else 2
    text = f"{figure.value:.{places}f}"
    return text if figure.low is None else f"{text} [{figure.low:.{places}f}, {figure.high:.{places}f}]"


Tables = dict[str, tuple[list[str], list[list[str]]]]


def tables(runs: Sequence[Run]) -> Tables:
    """Title → header and rows: the runs' figures, the settings that differ, the differences."""
    names = labels(runs)
    measures = list(dict.fromkeys(measure for run in runs for row in run.rows for measure in row.figures))
    figures = [
        [
            name,
            row.part,
            row.way,
            *(number(row.figures[m]) if m in row.figures else "" for m in measures),
            row.identical,
        ]
        for name, run in zip(names, runs, strict=True)
        for row in run.rows
    ]
    found: Tables = {"Runs": (["run", "what", "decoding", *measures, "identical answers"], figures)}
    if apart := differing(runs):
        found["Settings that differ"] = (["setting", *names], [[name, *values] for name, values in apart.items()])
    compared = [
        [f"{each.runs[0]} → {each.runs[1]}", " → ".join(dict.fromkeys(each.rows)), each.measure, number(each.first),
         number(each.other), change(each), each.verdict]
        for each in comparisons(runs)
    ]  # fmt: skip
    if compared:
        header = ["runs", "what", "measure", "first", "other", "change", "difference"]
        found["Differences"] = (header, compared)
    return found


PUBLISHED = "Published figures, measured by others"
PUBLISHED_NOTE = (
    "Each as its source states it. They are for orientation and enter no figure of the runs: machines, questions and "
    "ways of counting differ as the table says."
)


def published_notes(rows: Sequence[Published]) -> list[str]:
    """What the figures are, and the sources that the table numbers."""
    return [PUBLISHED_NOTE, *(f"[{n}] {source}: {checked}" for n, (source, checked) in enumerate(_sources(rows), 1))]


def _sources(rows: Sequence[Published]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.source, row.checked) for row in rows))


def published_table(rows: Sequence[Published], runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of published figures. ``differs``: the settings of each run that do."""
    header = ["method", "base", "questions", "setting", "τ", "speed-up", "identical", "differs", "source"]
    cells = []
    for row in rows:
        apart: dict[str, list[str]] = {}
        for name, run in zip(labels(runs), runs, strict=True):
            apart.setdefault(", ".join(row.differs(run.settings)) or "nothing", []).append(name)
        given = [f"{name} {value}" for name, value in row.stated.items() if value is not None]
        missing = [name for name, value in row.stated.items() if value is None]
        setting = [", ".join(given), f"not stated: {', '.join(missing)}" if missing else ""]
        same = "" if row.identical is None else f"{row.identical:.0%}"
        cells.append([
            row.method, row.base, row.set, "; ".join(filter(None, setting)), row.counted, row.faster, same,
            "; ".join(f"{', '.join(names)}: {what}" for what, names in apart.items()),
            f"[{_sources(rows).index((row.source, row.checked)) + 1}]",
        ])  # fmt: skip
    return header, cells


def change(each: Comparison) -> str:
    return f"{each.other.value / each.first.value - 1:+.1%}" if each.first.value else ""


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know beside the tables."""
    lines = [f"{name}: {run.path} ({run.kind})" for name, run in zip(labels(runs), runs, strict=True)]
    lines.append("In common: " + (", ".join(f"{name} {value}" for name, value in shared(runs).items()) or "no setting"))
    if apart := [name for name in differing(runs) if name not in NOT_COMPARED]:
        lines.append(f"The runs differ in {', '.join(apart)}: a difference may come from any of these.")
    moved = dict.fromkeys(each.runs for each in comparisons(runs) if each.measure == PLAIN and each.verdict in REAL)
    for first, other in moved:
        lines.append(f"Plain decoding was not equally fast in {first} and {other}: {SPEED} and {FIRST} may differ for "
                     "that reason alone. Compare the speed-ups, which are ratios within a run.")  # fmt: skip
    return [*lines, NOTE]


def as_json(runs: Sequence[Run], published: Sequence[Published] = ()) -> dict[str, Any]:
    """Everything as plain data. Published figures have a key of their own."""
    return {
        "runs": {
            name: {**asdict(run), "path": str(run.path), "rows": [
                {**asdict(row), "figures": {m: each._asdict() for m, each in row.figures.items()}} for row in run.rows
            ]} for name, run in zip(labels(runs), runs, strict=True)
        },
        "settings_that_differ": differing(runs),
        "comparisons": [
            {"runs": each.runs, "rows": each.rows, "measure": each.measure, "first": each.first._asdict(),
             "other": each.other._asdict(), "difference": each.verdict} for each in comparisons(runs)
        ],
        "published": [
            {**asdict(row), "differs": {labels(runs)[n]: row.differs(run.settings) for n, run in enumerate(runs)}}
            for row in published
        ],
    }  # fmt: skip


def write_markdown(runs: Sequence[Run], path: Path, published: Sequence[Published] = ()) -> None:
    """The notes and all tables."""
    parts = ["# Comparison", "\n".join(f"- {line}" for line in notes(runs))]
    for title, (header, rows) in tables(runs).items():
        parts += [f"## {title}", markdown_table(header, rows)]
    if published:
        parts += [f"## {PUBLISHED}", markdown_table(*published_table(published, runs)), *published_notes(published)]
    write_text(path, "\n\n".join(parts) + "\n")


def write_html(runs: Sequence[Run], path: Path, published: Sequence[Published] = ()) -> None:
    """A page with a chart of intervals for each measure, and the tables."""
    names, found = labels(runs), tables(runs)
    by_measure: dict[str, list[tuple[str, Interval]]] = {}
    for name, run in zip(names, runs, strict=True):
        for row in run.rows if len(runs) == 1 else run.rows[:1]:
            for measure, figure in row.figures.items():
                by_measure.setdefault(measure, []).append((f"{name}: {name_of(row)}", figure))
    drawn = [charts.intervals(measure, rows) for measure, rows in by_measure.items() if len(rows) > 1]
    drawn += [curve(name, run) for name, run in zip(names, runs, strict=True) if run.kind == "training"]
    sections = [page.section(title, page.table(header, rows)) for title, (header, rows) in found.items()]
    if published:
        lines = [page.paragraph(line, "muted") for line in published_notes(published)]
        sections.append(page.section(PUBLISHED, page.table(*published_table(published, runs)), *lines))
    page.write_page(
        path, "Runs side by side", page.header("Runs side by side", *notes(runs)),
        page.section("Figures and their 95 % intervals", page.charts(*drawn)), *sections,
    )  # fmt: skip


def curve(name: str, run: Run) -> str:
    """τ of a training run over its steps."""
    measures: Mapping[str, list[tuple[float, float]]] = {}
    for row in run.rows[::-1]:
        for measure, figure in row.figures.items():
            if "τ" in measure:
                measures.setdefault(measure, []).append((float(row.part.split()[-1]), figure.value))  # type: ignore[attr-defined]
    return charts.lines(f"{name}: τ in training", list(measures.items()), "step", "tokens per verification")

"""Questions about line charts: where lines start and end, how they run, which one is on top."""

from __future__ import annotations

from random import Random

from .ask_charts import COLOURS, Asker, ask_colour, ask_stands, head, head_facts
from .facts import Fact, choice, number
from .meaning import trend
from .phrases import Turn, listing, word_question
from .spec import Chart

TRENDS = ("rises", "falls", "stays level")


def _run(chart: Chart, i: int) -> str:
    """From start to end of one line."""
    row = chart.values[i]
    tail = "" if row[0] == row[-1] else f" by {abs(row[-1] - row[0])}"
    return f"starts at {row[0]} and ends at {row[-1]}, so it {trend(row)}{tail}"


def _ends(chart: Chart, i: int) -> list[Fact]:
    n, row = chart.names[i], chart.values[i]
    facts = [
        number("start", n, row[0], chart.step, "starts at"),
        number("end", n, row[-1], chart.step, "ends at"),
    ]
    if row[0] == row[-1] or abs(row[0] - row[-1]) >= 2 * chart.step:
        facts.append(choice("trend", n, trend(row), TRENDS, "so it"))
    return facts


def ask_run(rng: Random, chart: Chart) -> Turn:
    """How one line runs."""
    i = rng.randrange(len(chart.names))
    n = chart.names[i]
    core = rng.choice((
        f"How does {n} change?", f"Where does {n} start and where does it end?", f"What happens to {n} over time?",
        f"Does {n} rise or fall?", f"Tell me about the line of {n}.", f"How did {n} develop?",
    ))  # fmt: skip
    answer = f"The line of {n}, drawn in {chart.colours[i]}, {_run(chart, i)}. {head(chart)}; the unit is {chart.unit}."
    return Turn("run", word_question(rng, core, False), answer, [*_ends(chart, i), *head_facts(chart)])


def ask_lines(rng: Random, chart: Chart) -> Turn:
    """All lines."""
    core = rng.choice((
        "Describe this chart in detail.", "What does this picture show?", "Please describe the picture.",
        "Go through all lines one by one.", "Can you write down everything that this chart says?",
        "Read the whole chart for me.", "How does each of the lines run?", "What can you see here?",
    ))  # fmt: skip
    k = len(chart.names)
    lines = [f"{n}, drawn in {chart.colours[i]}, {_run(chart, i)}." for i, n in enumerate(chart.names)]
    answer = f"This is a line chart with {k} lines. {head(chart)}; the unit is {chart.unit}. " + " ".join(lines)
    facts = [number("count", "chart with", k), *head_facts(chart)]
    for i, n in enumerate(chart.names):
        facts += [choice("colour", n, chart.colours[i], COLOURS, "drawn in"), *_ends(chart, i)]
    return Turn("describe", word_question(rng, core, False), answer, facts)


def _ask_order(rng: Random, chart: Chart, column: int, place: str, verb: str) -> Turn:
    """Which line is on top at the first or last point."""
    when = chart.points[column]
    core = rng.choice((
        f"Which line is highest at the {place}?", f"Who is on top at the {place} of the period?",
        f"Which one has the most at the {place}?", f"Compare the lines at the {place}, please.",
    ))  # fmt: skip
    values = [row[column] for row in chart.values]
    steps = listing([f"{n} {verb} at {v}" for n, v in zip(chart.names, values, strict=True)])
    top = chart.names[values.index(max(values))]
    answer = f"At the {place} of the period, which is {when}, {steps}. So the highest at the {place} is {top}."
    facts = [number("start" if column == 0 else "end", n, v, chart.step, f"{verb} at")
             for n, v in zip(chart.names, values, strict=True)]  # fmt: skip
    facts.append(choice("highest", f"highest at the {place} is", top, chart.names))
    return Turn(f"order {place}", word_question(rng, core, False), answer, facts)


def ask_start(rng: Random, chart: Chart) -> Turn:
    """The order of the lines at the first point."""
    return _ask_order(rng, chart, 0, "start", "starts")


def ask_end(rng: Random, chart: Chart) -> Turn:
    """The order of the lines at the last point."""
    return _ask_order(rng, chart, -1, "end", "ends")


def _ask_meaning(rng: Random, chart: Chart) -> Turn | None:
    """Colour and name of a line; the answer ends with the line's run."""
    turn = rng.choice((ask_colour, ask_stands))(rng, chart)
    named = [i for i, n in enumerate(chart.names) if n in turn.answer]
    first = turn.answer.split(". ")[0].rstrip(".")
    return Turn(turn.kind, turn.question, f"{first}, and this line {_run(chart, named[0])}.", turn.facts)


LINE_ASKERS: tuple[tuple[Asker, float], ...] = (
    (ask_lines, 5), (ask_run, 2.5), (ask_start, 1), (ask_end, 1), (_ask_meaning, 1.5),
)  # fmt: skip

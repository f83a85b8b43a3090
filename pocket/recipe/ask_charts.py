"""Questions about bar and pie charts, which name one value for each name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .facts import Fact, choice, number, word
from .phrases import Turn, listing, word_question
from .spec import CHART_COLOURS, Chart, trend
from .tables import FIELDS

COLOURS = tuple(CHART_COLOURS)


def part(chart: Chart) -> str:
    """What the chart is made of."""
    return {"pie": "slice", "line": "line"}.get(chart.kind, "bar")


def head_facts(chart: Chart) -> list[Fact]:
    """Field and period, which every title names."""
    title = choice("title", "title says", chart.field, FIELDS)
    return [title, number("period", "period is", int(chart.period[:4]))]


def head(chart: Chart) -> str:
    """The first half of a sentence about the title."""
    return f"The title says {chart.field} and the period is {chart.period}"


def _value(chart: Chart, i: int) -> int:
    return chart.values[i][0]


def _at(chart: Chart, i: int) -> str:
    return f"{chart.names[i]} is at {_value(chart, i)}"


def _tolerance(chart: Chart) -> int:
    return 0 if chart.kind == "pie" else chart.step


def _number(chart: Chart, i: int) -> Fact:
    return number("value", chart.names[i], _value(chart, i), _tolerance(chart))


def ask_value(rng: Random, chart: Chart) -> Turn:
    """One value."""
    i, p = rng.randrange(len(chart.names)), part(chart)
    n, short = chart.names[i], rng.random() < 0.15
    core = rng.choice((
        f"What is the value of {n}?", f"How much does {n} have?", f"Which number belongs to {n}?",
        f"How large is the {p} of {n}?", f"What does the chart say about {n}?", f"Where does {n} stand?",
        f"Can you read the value of {n} for me?", f"I only care about {n}: what is its value?",
    ))  # fmt: skip
    if short:
        answer = f"{_at(chart, i)} {chart.unit}."
    else:
        answer = (
            f"The {p} of {n} is drawn in {chart.colours[i]} and its value is {_value(chart, i)}. {head(chart)}, "
            f"so the answer is that {_at(chart, i)} {chart.unit}."
        )
    return Turn("value", word_question(rng, core, short), answer, [_number(chart, i)])


def ask_describe(rng: Random, chart: Chart) -> Turn:
    """Everything there is to read."""
    p, k = part(chart), len(chart.names)
    core = rng.choice((
        "Describe this chart in detail.", "What does this picture show?", "Please describe the picture.",
        f"Go through all {p}s one by one.", "Can you write down everything that this chart says?",
        "Read the whole chart for me.", "List every name with its colour and its value.", "What can you see here?",
    ))  # fmt: skip
    noun = "pie" if p == "slice" else "bar"
    lines = [f"{n} is drawn in {c} and its value is {v[0]}." for n, c, v in
             zip(chart.names, chart.colours, chart.values, strict=True)]  # fmt: skip
    answer = f"This is a {noun} chart with {k} {p}s. {head(chart)}; the unit is {chart.unit}. " + " ".join(lines)
    facts = [number("count", "chart with", k), *head_facts(chart)]
    for i, n in enumerate(chart.names):
        facts += [choice("colour", n, chart.colours[i], COLOURS), _number(chart, i)]
    return Turn("describe", word_question(rng, core, False), answer, facts)


def ask_title(rng: Random, chart: Chart) -> Turn:
    """Title, period and names."""
    p = part(chart)
    core = rng.choice((
        "What is the chart about?", "What does the title say?", "Which topic and period does this chart cover?",
        "What is compared here?", f"Which names do the {p}s have?", "Give me the title and all names.",
    ))  # fmt: skip
    answer = (
        f"{head(chart)}. The chart compares {len(chart.names)} names: {listing(list(chart.names))}. "
        f"The values are given in {chart.unit}."
    )
    facts = [*head_facts(chart), number("count", "compares", len(chart.names))]
    facts += [word("name", n) for n in chart.names]
    return Turn("title", word_question(rng, core, False), answer, facts)


def ask_colour(rng: Random, chart: Chart) -> Turn:
    """From a name to its colour."""
    i, p = rng.randrange(len(chart.names)), part(chart)
    n, short = chart.names[i], rng.random() < 0.15
    core = rng.choice((
        f"Which colour does {n} have?", f"What is the colour of {n}?", f"How is {n} coloured?",
        f"In which colour is the {p} of {n} drawn?", f"By which colour can I find {n}?",
    ))  # fmt: skip
    answer = f"{n} is drawn in {chart.colours[i]}."
    if not short:
        answer += f" It is number {i + 1} of the {len(chart.names)} {p}s in this chart, and its value is "
        answer += f"{_value(chart, i)} {chart.unit}."
    fact = choice("colour", n, chart.colours[i], COLOURS)
    return Turn("colour", word_question(rng, core, short), answer, [fact])


def ask_stands(rng: Random, chart: Chart) -> Turn:
    """From a colour to its name."""
    i, p = rng.randrange(len(chart.names)), part(chart)
    c, short = chart.colours[i], rng.random() < 0.15
    core = rng.choice((
        f"What does the {c} {p} stand for?", f"Which name belongs to the colour {c}?", f"Who is shown in {c}?",
        f"What is the meaning of {c} in this chart?", f"Whose {p} is {c}?",
    ))  # fmt: skip
    answer = f"The {c} {p} stands for {chart.names[i]}."
    if not short:
        answer += f" It is number {i + 1} of the {len(chart.names)} {p}s in this chart, and its value is "
        answer += f"{_value(chart, i)} {chart.unit}."
    fact = choice("name of colour", c, chart.names[i], chart.names)
    return Turn("stands", word_question(rng, core, short), answer, [fact])


def ask_extremes(rng: Random, chart: Chart) -> Turn | None:
    """The highest and the lowest value, if no two are equal."""
    values = [v[0] for v in chart.values]
    high, low = values.index(max(values)), values.index(min(values))
    if values.count(max(values)) > 1 or values.count(min(values)) > 1:
        return None
    core = rng.choice((
        "Which one is the highest and which one is the lowest?", "Who has the most and who has the least?",
        "Name the largest and the smallest value.", "Between which values does everything lie?",
        "Who leads here, and who comes last?", "How far apart are the first and the last?",
    ))  # fmt: skip
    steps = listing([_at(chart, i) for i in range(len(values))])
    answer = (
        f"I compare all {len(values)} {part(chart)}s: {steps}. So the highest is {chart.names[high]} and the lowest is "
        f"{chart.names[low]}. They differ by {values[high]} - {values[low]} = {values[high] - values[low]}."
    )
    facts = [choice("highest", "highest is", chart.names[high], chart.names),
             choice("lowest", "lowest is", chart.names[low], chart.names),
             number("value", "differ by", values[high], _tolerance(chart))]  # fmt: skip
    return Turn("extremes", word_question(rng, core, False), answer, facts)


def _pair(rng: Random, chart: Chart) -> tuple[int, int]:
    i, j = rng.sample(range(len(chart.names)), 2)
    return i, j


def ask_compare(rng: Random, chart: Chart) -> Turn | None:
    """Which of two is higher."""
    i, j = _pair(rng, chart)
    a, b, x, y = chart.names[i], chart.names[j], _value(chart, i), _value(chart, j)
    if x == y or (abs(x - y) < 2 * chart.step and chart.kind != "pie"):
        return None
    core = rng.choice((
        f"Which is higher, {a} or {b}?", f"Compare {a} with {b}.", f"Does {a} have more than {b}?",
        f"How do {a} and {b} differ?", f"By how much do {a} and {b} differ?", f"Who has more: {a} or {b}?",
    ))  # fmt: skip
    more, less = (a, b) if x > y else (b, a)
    answer = (
        f"{a} is drawn in {chart.colours[i]} and {_at(chart, i)}. {b} is drawn in {chart.colours[j]} and "
        f"{_at(chart, j)}. So {more} is higher than {less}, by {abs(x - y)} {chart.unit}."
    )
    facts = [_number(chart, i), _number(chart, j), choice("higher", "So", more, (a, b))]
    return Turn("compare", word_question(rng, core, False), answer, facts)


def ask_together(rng: Random, chart: Chart) -> Turn:
    """The sum of two values."""
    i, j = _pair(rng, chart)
    a, b, x, y = chart.names[i], chart.names[j], _value(chart, i), _value(chart, j)
    core = rng.choice((
        f"How much do {a} and {b} have together?", f"What is the sum of {a} and {b}?", f"Add {a} and {b}, please.",
        f"If you put {a} and {b} together, what do you get?", f"What do {a} and {b} make in total?",
    ))  # fmt: skip
    answer = (
        f"First I read the two values: {_at(chart, i)} and {_at(chart, j)}. Then I add them, {x} + {y} = {x + y}, "
        f"so together they have {x + y} {chart.unit}."
    )
    tolerance = 2 * _tolerance(chart)
    facts = [_number(chart, i), _number(chart, j), number("sum", "together they have", x + y, tolerance)]
    return Turn("together", word_question(rng, core, False), answer, facts)


Asker = Callable[[Random, Chart], Turn | None]
CHART_ASKERS: tuple[tuple[Asker, float], ...] = (
    (ask_describe, 5), (ask_value, 2), (ask_title, 1.2), (ask_colour, 1), (ask_stands, 1), (ask_extremes, 1.5),
    (ask_compare, 1.5), (ask_together, 1.5),
)  # fmt: skip


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

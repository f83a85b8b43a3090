"""What a report of `msd bench` becomes: rows of a table, a Markdown row, a CSV file, a page."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from eagle.report import charts, markdown_table, page
from llava.files import atomic_write, write_text

Report = Mapping[str, Any]
CSV_COLUMNS = (
    "base", "draft", "card", "dtype", "attention", "compiled", "batch", "temperature", "tree", "max_new_tokens", "data",
    "source", "questions", "new_tokens", "tokens_per_second", "baseline_tokens_per_second", "baseline",
    "first_token_ms", "baseline_first_token_ms", "tau", "accepted_per_cycle", "speedup", "paired_speedup",
    "paired_low", "paired_high", "identical", "near_ties", "acceptance_by_position",
)  # fmt: skip
LOSING = 10
"""Questions listed where speculation loses most."""


def parts(report: Report) -> dict[str, Report]:
    """The figures of each source, then those of all questions, by name."""
    return {**report["sources"], "total": report}


def own_name(report: Report) -> str:
    """The contestant that was measured: the first one in the times of the first token."""
    return next(iter(report["first_token_ms"]))


def lacks_compiled_baseline(report: Report) -> bool:
    """Whether MSD was compiled and plain decoding was not, so that the speed-up is not over the strongest one."""
    names = report.get("baselines", {})
    return bool(report.get("setting", {}).get("compiled")) and not any(", compiled" in name for name in names)


def interval_text(paired: Mapping[str, float | None] | None) -> str:
    """The interval of a mean; nothing if it is not known."""
    return "" if paired is None or paired["low"] is None else f" [{paired['low']:.2f}, {paired['high']:.2f}]"


def mean_text(paired: Mapping[str, float | None] | None) -> str:
    """A mean with its interval.

    >>> mean_text({"mean": 2.0, "low": 1.5, "high": 2.5})
    '2.00x [1.50, 2.50]'
    """
    return "" if paired is None else f"{paired['mean']:.2f}x{interval_text(paired)}"


def identical_text(same: Mapping[str, Any] | None) -> str:
    """
    >>> identical_text({"answers": 8, "of": 10, "near_ties": 1})
    '8 of 10 (1 of 2 differ at a near tie)'
    """
    if same is None:
        return "not compared (sampled without a seed)"
    differ = same["of"] - same["answers"]
    near = f" ({same['near_ties']} of {differ} differ at a near tie)" if differ else ""
    return f"{same['answers']} of {same['of']}{near}"


def row(report: Report, figures: Report) -> dict[str, str]:
    """The figures of a part, as text by column."""
    speeds, first = figures["tokens_per_second"], figures["first_token_ms"]
    return {
        "questions": str(figures["questions"]),
        "tokens/s": f"{speeds['msd']:.1f}",
        "plain tokens/s": f"{speeds['baseline']:.1f}",
        "first token": f"{first[own_name(report)]:.0f} ms",
        "plain first token": f"{first[report['baseline_name']]:.0f} ms",
        "τ": f"{figures['tau']:.2f}",
        "without bonus": f"{figures['accepted_per_cycle']:.2f}",
        "speed-up of totals": f"{figures['speedup']:.2f}x",
        "mean of questions": mean_text(figures["paired_speedup"]),
        "identical answers": identical_text(figures["identical"]),
    }


def setting(report: Report) -> dict[str, str]:
    """What the figures depend on, as text by column."""
    settings = report["settings"]
    own = {name: str(value) for name, value in report["setting"].items()}
    own["temperature"] = f"{report['setting']['temperature']:g}"
    own["card"] = (
        report["hardware"].get("gpu") or f"{report['hardware']['cpu']}, {report['hardware']['threads']} threads"
    )
    own["compiled"] = "yes" if report["setting"]["compiled"] else "no"
    own |= {"tree": tree_text(settings["tree"]), "max_new_tokens": str(settings["max_new_tokens"])}
    own["data"] = questions_of(settings)
    return {"base": Path(settings["base_model"]).name, "draft": Path(settings["msd_model"]).name, **own}


def tree_text(tree: Mapping[str, Any]) -> str:
    """The bounds of a `TreeConfig`.

    >>> tree_text({"depth": 6, "top_k": 3, "total_tokens": 12, "adaptive": False})
    '6/3/12'
    """
    return "auto" if tree["adaptive"] else "{depth}/{top_k}/{total_tokens}".format(**tree)


def questions_of(settings: Mapping[str, Any]) -> str:
    """Which questions were asked.

    >>> questions_of({"suite": "mmspec", "subset": None, "data": "x/questions.jsonl", "limit": None})
    'mmspec test'
    >>> questions_of({"data": "pocket/data/heldout.jsonl", "limit": 4})
    'heldout.jsonl, first 4'
    """
    suite, limit = settings.get("suite"), settings.get("limit")
    name = f"{suite} {settings.get('subset') or 'test'}" if suite else Path(settings["data"]).name
    return f"{name}, first {limit}" if limit else name


def markdown(report: Report) -> str:
    """A table of one row, to be put below those of others."""
    cells = {**setting(report), **row(report, report), "over": report["baseline_name"]}
    shares = " ".join(f"{share:.2f}" for share in report["acceptance_by_position"])
    cells |= {
        "accepted at 1, 2, …": shares,
        "commit": (report["commit"] or "unknown")[:12],
        "date": report["date"][:10],
    }
    return markdown_table(list(cells), [list(cells.values())]) + "\n"


def write_markdown(report: Report, path: Path) -> None:
    write_text(path, markdown(report))


def write_csv(report: Report, path: Path) -> None:
    """A line for each source and one for the total."""
    own = own_name(report)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for name, figures in parts(report).items():
            paired, same = figures["paired_speedup"] or {}, figures["identical"] or {}
            writer.writerow({
                **setting(report),
                "source": name,
                **{key: figures[key] for key in ("questions", "new_tokens", "tau", "accepted_per_cycle", "speedup")},
                "tokens_per_second": figures["tokens_per_second"]["msd"],
                "baseline_tokens_per_second": figures["tokens_per_second"]["baseline"],
                "baseline": report["baseline_name"],
                "first_token_ms": figures["first_token_ms"][own],
                "baseline_first_token_ms": figures["first_token_ms"][report["baseline_name"]],
                **{f"paired_{key}": paired.get(key) for key in ("low", "high")},
                "paired_speedup": paired.get("mean"),
                "identical": same.get("answers"),
                "near_ties": same.get("near_ties"),
                "acceptance_by_position": " ".join(f"{share:.4f}" for share in figures["acceptance_by_position"]),
            })  # fmt: skip


def speedup_of(answer: Report) -> float:
    """Tokens per second of an answer over those of the plain one."""
    own = sum(map(len, answer["cycles"])) / answer["seconds"]["msd"]
    return own / (answer["baseline_tokens"] / answer["seconds"]["baseline"])


def tau_of(answer: Report) -> float:
    """New tokens per cycle of an answer; 0 without a cycle."""
    _prefill, *cycles = answer["cycles"]
    return sum(map(len, cycles)) / len(cycles) if cycles else 0.0


def line_of(answer: Report) -> str:
    """An answer in one line."""
    source = f"{answer['source']}, " if answer["source"] else ""
    tokens = sum(map(len, answer["cycles"]))
    return f"{source}{answer['id']}: {speedup_of(answer):.2f}x, τ {tau_of(answer):.2f}, {tokens} tokens"


def write_html(report: Report, path: Path) -> None:
    """A page: the row, plots, where speculation loses, and the answers, slowest first."""
    where = setting(report)
    name = f"{where['base']} with {where['draft']}"
    logged = sorted(report["answers"], key=speedup_of)
    losing = [answer for answer in logged if speedup_of(answer) < 1]
    lost = f"{len(losing)} of {len(logged)} questions were answered more slowly than by {report['baseline_name']}."
    total = row(report, report)
    identical, _, more = identical_text(report["identical"]).partition(" (")
    more = f"({more}" if more else ""
    rows = {part: row(report, figures) for part, figures in parts(report).items()}
    machine = f"{where['card']}, {where['dtype']}, attention {where['attention']}, compiled: {where['compiled']}, "
    machine += f"batch {where['batch']}, T = {where['temperature']}, tree {where['tree']}, "
    machine += f"up to {where['max_new_tokens']} new tokens; questions: {where['data']}"
    cycles = max(report["cycles"], 1)
    deepest = max(map(int, report["histogram"]), default=0)
    counts = {int(accepted): count for accepted, count in report["histogram"].items()}
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    page.write_page(
        path,
        name,
        page.header(name, machine, f"Baseline: {report['baseline_name']}, the fastest plain decoding of the same run"),
        page.tiles([
            (total["speed-up of totals"], "speed-up of totals"),
            (total["mean of questions"].partition(" ")[0] or "none",
             f"mean of questions{interval_text(report['paired_speedup'])}"),
            (total["tokens/s"], f"tokens/s; plain: {total['plain tokens/s']}"),
            (total["first token"], f"to the first token; plain: {total['plain first token']}"),
            (total["τ"], f"τ, with the bonus token; without: {total['without bonus']}"),
            (identical, f"answers identical to plain decoding {more}"),
        ]),
        page.section("By source", page.table(
            ["source", *total], [[part, *cells.values()] for part, cells in rows.items()]
        )),
        page.section("Acceptance and speed", page.charts(
            charts.columns(
                "Accepted drafted tokens in a cycle", [counts.get(n, 0) / cycles for n in range(deepest + 1)],
                "accepted tokens", "share of cycles",
            ),
            charts.columns(
                "Accepted at each position", report["acceptance_by_position"], "position in the draft",
                "share of cycles", first=1,
            ) if report["acceptance_by_position"] else "",
            charts.points(
                "Speed-up of each question", [(tau_of(each), speedup_of(each), each["id"]) for each in logged],
                "τ of the answer", "speed-up", 1.0, "Below the dashed line speculation loses.",
            ),
            charts.points(
                "Speed-up by length",
                [(sum(map(len, each["cycles"])), speedup_of(each), each["id"]) for each in logged],
                "new tokens", "speed-up", 1.0,
            ),
        )),
        page.section("Where speculation loses", page.paragraph(lost), page.table(
            ["question", "speed-up", "τ", "new tokens", "question's text"],
            [[each["id"], f"{speedup_of(each):.2f}x", f"{tau_of(each):.2f}", str(sum(map(len, each["cycles"]))),
              shorten(each["question"], 80, placeholder=" …")] for each in losing[:LOSING]],
        ) if losing else ""),
        page.section("Answers, slowest first", page.answers(logged, [line_of(each) for each in logged])),
        page.section("How it was measured", page.paragraph("Command: " + " ".join(report["command"])),
                     page.paragraph(f"{report['date']}, commit {report['commit']}, {versions}")),
    )  # fmt: skip

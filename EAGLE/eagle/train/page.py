"""The page of a run, ``training.html``: loss, simulated and served τ over the steps, and the newest answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle.report import charts, page
from eagle.report.bench import tau_of
from eagle.report.compare import number
from eagle.report.intervals import Interval
from eagle.report.runs import tau_of as tau_of_all


def write_page(history: Mapping[str, Any], path: Path) -> None:
    """Writes the page. ``history`` as in ``training.json``."""
    steps, validations, served = history["steps"], history["validations"], history.get("served", [])
    losses = [("training", [(row["step"], row["loss"]) for row in steps])]
    losses += validated(validations, "loss")
    taus = [("decoding", [(row["step"], row["tau"]) for row in served]), *validated(validations, "tau")]
    rows = [
        [str(row["step"]), number(tau_of_all(row["answers"]) or Interval(row["tau"])),
         f"{row['accepted_per_cycle']:.2f}", " ".join(f"{share:.2f}" for share in row["acceptance_by_position"]),
         str(row["new_tokens"])]
        for row in served
    ]  # fmt: skip
    header = ["step", "τ, 95 % interval", "without bonus", "accepted at position 1, 2, …", "new tokens"]
    newest = served[-1]["answers"] if served else []
    page.write_page(
        path, "Training run", page.header("Training run", f"{path.parent.name}, {len(steps)} logged steps"),
        page.section("Loss and tokens per verification", page.charts(
            charts.lines("Loss", losses, "step", "loss") if steps else "",
            charts.lines("τ: decoding, and simulated on validation samples", taus, "step", "tokens per verification")
            if served or validations else "",
        )),
        page.section("Evaluations by decoding", page.table(header, rows) if rows else ""),
        page.section(
            f"Answers at step {served[-1]['step']}", page.answers(newest, [line_of(each) for each in newest])
        ) if served else "",
    )  # fmt: skip


def validated(validations: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """A line for each validation set."""
    names = sorted({name for row in validations for name in row["results"]})
    return [
        (f"{name} set", [(row["step"], row["results"][name][key]) for row in validations if name in row["results"]])
        for name in names
    ]


def line_of(answer: Mapping[str, Any]) -> str:
    """An answer in one line."""
    return f"{answer['id']}: τ {tau_of(answer):.2f}, {sum(map(len, answer['cycles']))} tokens"

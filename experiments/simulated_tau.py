"""Does the acceptance that training simulates predict the one of decoding? For the runs of a training study.

    python -m experiments.simulated_tau --study outputs/training_study-llava

A point is a checkpoint: simulated τ of validation at its step (``training.json``, conversations with pictures that were
held back from training) against τ of `msd bench` on the study's held-out questions, with a chain as deep as the
simulated one and with the default tree. Final drafts were measured by the study; the other ``step-`` folders are
measured now, unless ``--final-only``. Finished measurements are read, so an interrupted run resumes.

Writes simulated_tau.json, .md and .png into the study's folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import caption, run_record
from experiments.training_study import bench, chain_tau
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import atomic_write, read_json, write_json, write_text

SERVED = {"chain": "tau_chain", "tree": "tau_tree"}


def main() -> None:
    """Points → correlations → files."""
    options = parse_args()
    study = read_json(options.study / "study.json", "settings of the study")
    found = [point for run in runs(options.study) for point in points(run, study, options.final_only)]
    if len(found) < 3:
        raise UserError(f"{len(found)} checkpoints are measured, too few to compare", where=options.study,
                        fix="run experiments.training_study there first")  # fmt: skip
    record = {**run_record(), "base": study["base"], "correlation": correlations(found), "points": found}
    write_json(options.study / "simulated_tau.json", record)
    text = table(record)
    write_text(options.study / "simulated_tau.md", text)
    plot(record, options.study / "simulated_tau.png")
    print(text)


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="folder of experiments.training_study")
    parser.add_argument("--final-only", action="store_true", help="final drafts alone: nothing is measured now")
    return parser.parse_args()


def runs(study: Path) -> list[Path]:
    """Folders of the runs that are measured."""
    return sorted(file.parent for file in study.glob("*-seed*/cell.json"))


def points(run: Path, study: dict[str, Any], final_only: bool) -> Iterator[dict[str, Any]]:
    """The checkpoints of a run that have a validation, oldest first."""
    from eagle.train.schedule import IMAGE

    history = read_json(run / "checkpoints" / "training.json", "history of a training")
    simulated = {row["step"]: row["results"][IMAGE]["tau"] for row in history["validations"] if IMAGE in row["results"]}
    last, depth = history["steps"][-1]["step"], study["shared"]["simulated_depth"]
    for folder in sorted((run / "checkpoints").glob("step-*")):
        step = int(folder.name.removeprefix("step-"))
        if step not in simulated or (final_only and step != last):
            continue
        out = run / ("bench.json" if step == last else f"bench-{folder.name}.json")
        questions = run.parent / "questions.jsonl"
        report = bench(study["base"], folder, questions, study["max_new_tokens"], depth, out, run / "log.txt")
        yield {
            "run": run.name, "step": step, "simulated": simulated[step],
            "tau_chain": chain_tau(report, depth), "tau_tree": report["tau"], "speedup": report["speedup"],
        }  # fmt: skip


def correlations(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of simulated τ with each kind of served τ: Pearson's r, Spearman's rank correlation, mean difference."""
    simulated = np.array([point["simulated"] for point in found])
    result = {}
    for kind, key in SERVED.items():
        served = np.array([point[key] for point in found])
        result[kind] = {
            "pearson": correlation(simulated, served),
            "spearman": correlation(ranks(simulated), ranks(served)),
            "served_minus_simulated": float((served - simulated).mean()),
        }
    return result


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of two [N]; 0 where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """[N] ranks from 0, equal values sharing their mean rank.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts + ends - 1) / 2)[where]


def table(record: dict[str, Any]) -> str:
    """The points and the correlations in markdown."""
    lines = ["| run | step | simulated τ | served τ, chain | served τ, tree | speed-up |", "|---|" + "---:|" * 5]
    for point in record["points"]:
        values = (point[key] for key in ("simulated", "tau_chain", "tau_tree", "speedup"))
        lines.append(f"| {point['run']} | {point['step']} | {' | '.join(f'{value:.2f}' for value in values)} |")
    lines += ["", "| served with a | Pearson | Spearman | served less simulated |", "|---|---:|---:|---:|"]
    for kind, values in record["correlation"].items():
        numbers = " | ".join(f"{value:.2f}" for value in values.values())
        lines.append(f"| {kind} | {numbers} |")
    return "\n".join([*lines, "", f"{record['base']}, {len(record['points'])} checkpoints. {caption(record)}.", ""])


def plot(record: dict[str, Any], path: Path) -> None:
    """Served against simulated τ, and the line where both are equal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 5), layout="constrained")
    simulated = [point["simulated"] for point in record["points"]]
    for kind, key in SERVED.items():
        r = record["correlation"][kind]["pearson"]
        axes.plot(simulated, [point[key] for point in record["points"]], "o", ms=5, label=f"{kind}, r = {r:.2f}")
    ends = [min(simulated), max(simulated)]
    axes.plot(ends, ends, "--", lw=0.8, color="grey", label="equal")
    axes.set(xlabel="simulated τ (validation, chain)", ylabel="served τ (msd bench)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_cli(main))

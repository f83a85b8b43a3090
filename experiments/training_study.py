"""The paper's claims about training, in miniature: each way of training for the same number of steps, then τ and speed.

    python -m experiments.training_study                                  on pocket/llava, about 14 trainings
    python -m experiments.training_study --base pocket/qwen2vl
    python -m experiments.training_study --quick --out outputs/try        to see that it runs

Ways of training (`CELLS`): two-stage, not decoupled, text alone, pictures alone, mixed from the start, and two-stage
with two and three steps on the draft's own outputs; each with every seed. A cell is trained by
`eagle.train.main_deepspeed` in one process and measured by `msd bench` on held-out pictures, with the fixed tree and
with a chain.

OUT/RUN/ has the training config, checkpoints, bench.json and cell.json of each run; OUT/ has results.json, results.md
and results.png. Finished parts are not repeated and an interrupted training resumes: run the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from eagle.hidden_states.index import INDEX
from eagle.questions import read_questions
from eagle.train.settings import TrainConfig, find_config
from experiments.common import REPO, caption, environment, run_record
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import atomic_write, read_json, write_json, write_text
from llava.strict import read_strict

DEEPSPEED = "pocket_ds_config.json"  # batch sizes, precision
HELDOUT = Path("pocket/data/heldout.jsonl")
TEXT_SHARE = 0.5  # of the two-stage cells, as published
TAIL = 12  # lines of a failed step's log that are shown


@dataclass(frozen=True)
class Cell:
    """One way to train. ``train`` and ``msd``: keys of these sections of the training config that differ."""

    name: str
    what: str
    train: Mapping[str, Any] = field(default_factory=dict)
    msd: Mapping[str, Any] = field(default_factory=dict)


REFERENCE = Cell("two-stage", "text alone, then ever more pictures; decoupled (the recipe)")
CELLS = (
    REFERENCE,
    Cell("not-decoupled", "two-stage; image positions through fc, as EAGLE does", msd={"decoupled": False}),
    Cell("text-only", "no picture in any epoch", {"text_share": 1.0}),
    Cell("image-only", "pictures alone in every epoch", {"text_share": 0.0, "image_start": 1.0, "image_end": 1.0}),
    Cell("mixed", "half pictures, half text in every epoch",
         {"text_share": 0.0, "image_start": 0.5, "image_end": 0.5}),
    Cell("two-stage-k2", "two-stage, two steps on the draft's own outputs", {"rollout_steps": 2}),
    Cell("two-stage-k3", "two-stage, three steps on the draft's own outputs", {"rollout_steps": 3}),
)  # fmt: skip


def choose(names: Sequence[str]) -> list[Cell]:
    """The cells of these names, in the order of `CELLS`; all where none is named."""
    known = {cell.name: cell for cell in CELLS}
    for name in names:
        if name not in known:
            raise UserError(f"no cell '{name}'", where="--cells", fix=f"one of {', '.join(known)}")
    return [cell for cell in CELLS if not names or cell.name in names]


def training_config(base: Mapping[str, Any], cell: Cell, shared: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` (a training config) with what all cells share and what this one has of its own. All cells train one
    step on true hidden states unless they say otherwise."""
    train = {**base.get("train", {}), "rollout_steps": 1, **shared, **cell.train}
    return {**base, "train": train, **({"msd": {**base.get("msd", {}), **cell.msd}} if cell.msd else {})}


@dataclass(frozen=True)
class Study:
    """What all cells share. ``states``: folder with ``hidden_t`` and ``hidden_v``; ``steps``: of every training."""

    out: Path
    base: str
    states: Path
    config: dict[str, Any]
    shared: dict[str, Any]
    steps: int
    questions: Path
    tokens: int

    @property
    def depth(self) -> int:
        """Tokens drafted in simulated decoding."""
        return int(self.shared["simulated_depth"])


def main() -> None:
    """Hidden states → questions → every cell and seed → report."""
    options = parse_args()
    study = prepare(options)
    rows = []
    for seed in options.seeds:
        for cell in choose(options.cells):
            first = cell is REFERENCE and seed == options.seeds[0]
            rows.append(run_cell(study, cell, seed, keep_all=first))
            write_report(study.out, rows, run_record())
    print((study.out / "results.md").read_text(encoding="utf-8"))


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m experiments.training_study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--base", default="pocket/llava", help="pocket base model (default %(default)s)")
    add("--data", type=Path, metavar="FOLDER", help="hidden states in FOLDER/hidden_t and FOLDER/hidden_v "
        "(default: those of pocket/recipe/train_draft.sh, made if missing)")  # fmt: skip
    add("--questions", type=int, help="held-out questions with pictures that are asked (default 48)")
    add("--max-new-tokens", type=int, help="(default 128)")
    add("--steps", type=int, help="steps of each training, rounded to whole epochs (default 1200)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    add("--cells", nargs="+", default=[], help="these alone (default: all)")
    add("--out", type=Path, help="(default: outputs/training_study-BASE)")
    add("--quick", action="store_true", help="two epochs on a little data, two questions: shows that it runs")
    options = parser.parse_args()
    defaults = (2, 16, 1) if options.quick else (48, 128, 1200)
    for name, value in zip(("questions", "max_new_tokens", "steps"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.out = options.out or Path("outputs") / f"training_study-{Path(options.base).name}"
    return options


def prepare(options: argparse.Namespace) -> Study:
    """Finds or makes the data, and claims the folder for these settings."""
    config = read_json(find_config(config_of(options.base)), "training config")
    states = options.data or hidden_states(options.base, options.out, options.quick)
    if options.quick:
        config = {**config, "train": {**config.get("train", {}), "log_every": 1, "validation_limit": 2}}
    epochs, steps = plan(states, config, options.steps)
    depth = config.get("train", {}).get("simulated_depth", TrainConfig().simulated_depth)
    shared = {"epochs": epochs, "text_share": TEXT_SHARE, "simulated_depth": depth, "keep_last": 1}
    settings = {"base": options.base, "data": str(states), "config": config, "shared": shared, "steps": steps,
                "questions": options.questions, "max_new_tokens": options.max_new_tokens}  # fmt: skip
    claim(options.out, settings)
    questions = write_questions(options.questions, options.out / "questions.jsonl")
    print(f"{epochs} epochs, {steps} steps a training, {options.questions} questions: {options.out}", flush=True)
    return Study(options.out, options.base, states, config, shared, steps, questions,
                 options.max_new_tokens)  # fmt: skip


def config_of(base: str) -> str:
    """The shipped training config of a pocket base."""
    name = f"pocket_{Path(base).name}_config.json"
    if not find_config(name).is_file():
        raise UserError("no training config is shipped for this base", where=base, fix="use a pocket base")
    return name


def hidden_states(base: str, out: Path, quick: bool) -> Path:
    """The folder of a pocket base's hidden states, made by pocket/recipe/train_draft.sh if missing."""
    target = Path(base).name
    if Path(base).resolve() != REPO / "pocket" / target:
        raise UserError("hidden states of a base that is not in pocket/", where=base, fix="give --data")
    folder = out / "data" if quick else REPO / "pocket" / "build" / f"draft-{target}"
    if not all((folder / name / INDEX).is_file() for name in ("hidden_t", "hidden_v")):
        amounts = {"IMAGES": "24", "TEXTS": "24"} if quick else {}
        made = {"TARGET": target, "BUILD": str(folder.resolve()), "STATES_ONLY": "1", "PYTHON": sys.executable}
        script = ["bash", str(REPO / "pocket" / "recipe" / "train_draft.sh")]
        status = subprocess.run(script, env={**os.environ, **made, **amounts}, check=False).returncode
        if status:
            raise UserError(f"pocket/recipe/train_draft.sh ended with status {status}", fix="see its last lines")
    return folder


def plan(states: Path, config: dict[str, Any], steps: int) -> tuple[int, int]:
    """(epochs, steps) of a training: whole epochs, at least two, as near to ``steps`` as they come."""
    from eagle.hidden_states.shards import ShardDataset
    from eagle.train.dataset import TrainingData
    from eagle.train.engine import read_deepspeed_config
    from eagle.train.schedule import IMAGE, TEXT, BatchSizes

    sets = {TEXT: ShardDataset(states / "hidden_t"), IMAGE: ShardDataset(states / "hidden_v")}
    train = read_strict(TrainConfig, config.get("train", {}), "training config")
    sizes = BatchSizes.from_deepspeed(read_deepspeed_config(DEEPSPEED), 1, where=DEEPSPEED)
    per_epoch = TrainingData.split(sets, train).schedule(sizes, train).steps_per_epoch
    epochs = max(2, round(steps / per_epoch))
    return epochs, epochs * per_epoch


def write_questions(count: int, file: Path) -> Path:
    """The first ``count`` held-out questions with pictures as a question file."""
    asked = [question for question in read_questions(HELDOUT) if question.images][:count]
    rows = [{"id": each.id, "question": each.question, "answer": each.answer,
             "images": [os.path.relpath(image, file.parent) for image in each.images]} for each in asked]  # fmt: skip
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def run_cell(study: Study, cell: Cell, seed: int, keep_all: bool) -> dict[str, Any]:
    """Trains and measures one cell with one seed; what is done already is read."""
    folder = study.out / f"{cell.name}-seed{seed}"
    record = folder / "cell.json"
    if record.is_file():
        return read_json(record, "record of a cell")
    print(f"{cell.name}, seed {seed}", flush=True)
    checkpoints, log = folder / "checkpoints", folder / "log.txt"
    if not (checkpoints / "training.json").is_file():
        own = training_config(study.config, cell, {**study.shared, "seed": seed})
        if keep_all:  # for the comparison of simulated and served acceptance
            own["train"]["keep_last"] = own["train"]["epochs"]
        write_json(folder / "config.json", own)
        argv = ["--basepath", study.base, "--cpdir", str(checkpoints), "--config", str(folder / "config.json")]
        argv += ["--tmpdir_t", str(study.states / "hidden_t"), "--tmpdir_v", str(study.states / "hidden_v")]
        argv += ["--deepspeed_config", DEEPSPEED, "--tracker", "none", "--resume"]
        launch("eagle.train.main_deepspeed", argv, log)
    report = bench(
        study.base, checkpoints / "final", study.questions, study.tokens, study.depth, folder / "bench.json", log
    )
    row = describe(study, cell, seed, read_json(checkpoints / "training.json", "history of a training"), report)
    write_json(record, row)
    return row


def describe(study: Study, cell: Cell, seed: int, history: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The record of a cell: what was trained, and what it gave."""
    last, steps = history["validations"][-1], history["steps"][-1]["step"]
    if steps != study.steps:
        raise UserError(f"trained for {steps} steps, not {study.steps}", where=cell.name, fix="remove its folder")
    return {
        "cell": cell.name, "what": cell.what, "seed": seed, "steps": steps, "base": study.base,
        "train": {**study.shared, **cell.train}, "msd": dict(cell.msd),
        "tau": report["tau"], "tau_chain": chain_tau(report, study.depth), "speedup": report["speedup"],
        "baseline": report["baseline_name"], "questions": report["questions"], "tokens": report["new_tokens"],
        "simulated_tau": {name: values["tau"] for name, values in last["results"].items()},
        "top1": {name: values["top1"] for name, values in last["results"].items()}, **run_record(),
    }  # fmt: skip


def launch(module: str, argv: Sequence[str], log: Path) -> None:
    """Runs ``python -m module argv`` in a child process; appends its output to ``log``.

    Raises:
        UserError: it failed; the end of its log is printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        command = [sys.executable, "-m", module, *argv]
        status = subprocess.run(command, env=environment(), stdout=output, stderr=subprocess.STDOUT, check=False)
    if status.returncode:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        print("\n".join(end), file=sys.stderr)
        raise UserError(
            f"{module} ended with status {status.returncode}",
            where=log,
            fix="fix the cause and run the same command again",
        )


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes ``folder`` the place of a study with these settings; what is in it already must have the same.

    Raises:
        UserError: the folder holds a study with other settings; the message names the first that differs.
    """
    file, given = folder / "study.json", json.loads(json.dumps(settings))
    if file.is_file():
        known = read_json(file, "settings of the study")
        for key in {**given, **known}:
            if given.get(key) != known.get(key):
                raise UserError(
                    f"the study here had {key}={known.get(key)}, this one has {given.get(key)}",
                    where=folder,
                    fix="give the same settings, or another --out",
                )
    write_json(file, given)


def bench(base: str | Path, draft: Path, questions: Path, tokens: int, depth: int, out: Path, log: Path) -> dict:
    """The report of `msd bench`, measured unless ``out`` has it already. With the device's fixed tree, so that τ does
    not depend on time, and with a chain of ``depth`` drafted tokens beside it."""
    if not out.is_file():
        argv = ["bench", "--base-model", str(base), "--msd-model", str(draft), "--data", str(questions)]
        argv += ["--max-new-tokens", str(tokens), "--baseline-dtype", "float32", "--tree", "fixed"]
        argv += ["--also-tree", chain(depth)]
        launch("eagle.cli", [*argv, "--out", str(out)], log)
    return read_json(out, "report of msd bench")


def chain(depth: int) -> str:
    """The tree of `msd bench --also-tree` that is a chain of ``depth`` drafted tokens below the root.

    >>> chain(6)
    '5/1/7'
    """
    return f"{depth - 1}/1/{depth + 1}"


def chain_tau(report: Mapping[str, Any], depth: int) -> float:
    """τ of the chain in a report of `bench`."""
    (found,) = (values["tau"] for name, values in report["others"].items() if name.endswith(f"tree {chain(depth)}"))
    return float(found)


Row = Mapping[str, Any]

COLUMNS: dict[str, Callable[[Row], float | None]] = {
    "τ (tree)": lambda row: row["tau"],
    "τ (chain)": lambda row: row["tau_chain"],
    "speed-up": lambda row: row["speedup"],
    "simulated τ, pictures": lambda row: row["simulated_tau"].get("image"),
    "simulated τ, text": lambda row: row["simulated_tau"].get("text"),
}
PLOTTED = ("τ (tree)", "speed-up")


def write_report(folder: Path, rows: Sequence[Row], made: Mapping[str, Any]) -> None:
    """Writes results.json, results.md and results.png. ``rows``: the records so far."""
    write_json(folder / "results.json", {**made, "cells": list(rows)})
    write_text(folder / "results.md", table(rows, made))
    plot(rows, folder / "results.png")


def by_cell(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The records of each cell, seeds together."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    return cells


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean, and the range where values differ.

    >>> spread([2.0, 2.5]), spread([3.0]), spread([None]), spread([245, 245], 0)
    ('2.25 (2.00 to 2.50)', '3.00', '', '245')
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    wide = f" ({min(known):.{digits}f} to {max(known):.{digits}f})" if min(known) < max(known) else ""
    return f"{mean(known):.{digits}f}{wide}"


def table(rows: Sequence[Row], made: Mapping[str, Any]) -> str:
    """A markdown table, one line per cell: means over seeds, and their range."""
    first = rows[0]
    head = ["training", "what", "seeds", *COLUMNS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 3}{'---:|' * len(COLUMNS)}"]
    for name, cell in by_cell(rows).items():
        seeds = ", ".join(str(row["seed"]) for row in cell)
        values = [spread([read(row) for row in cell]) for read in COLUMNS.values()]
        lines.append(f"| {' | '.join([name, cell[0]['what'], seeds, *values])} |")
    note = (
        f"{first['base']}, {first['steps']} steps each, {first['questions']} held-out questions with pictures, greedy; "
        f"mean (lowest to highest) over seeds. {caption(made)}."
    )
    return "\n".join([*lines, "", note, ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """A dot for each seed, a bar for their mean; acceptance on the left, speed on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = by_cell(rows)
    places = range(len(cells))
    figure, panels = pyplot.subplots(
        1, len(PLOTTED), figsize=(11, 1.2 + 0.45 * len(cells)), sharey=True, layout="constrained"
    )
    for axes, title in zip(panels, PLOTTED, strict=True):
        read = COLUMNS[title]
        values = [[float(read(row) or 0.0) for row in cell] for cell in cells.values()]
        axes.barh(places, [mean(each) for each in values], height=0.6, color="tab:blue", alpha=0.35)
        for place, each in zip(places, values, strict=True):
            axes.plot(each, [place] * len(each), "o", ms=4, color="tab:blue")
        axes.set(title=title, yticks=list(places), yticklabels=list(cells), xlim=(0, None))
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Which kind of draft is best after the same training: MSD, EAGLE-3 with each kind of image rows, block, ViSpec.

    TARGET=llava BUILD=STATES IMAGES=800 TEXTS=300 FEATURE_LAYERS=auto STATES_ONLY=1 pocket/recipe/train_draft.sh
    python -m experiments.draft_kinds --pair llava --hidden STATES --out OUT
    python -m experiments.draft_kinds table --out OUT                      # of what is there

Every kind starts from random weights and trains on the same samples in the same order, 70 % of them with a picture from
the first step to the last. Parts, all of them by default:

    cost      seconds of a training step of each kind, in turns in one process
    train     each kind with each seed
    evaluate  all trained kinds of a seed on held-out questions with pictures, in one interleaved run
    table     prints the tables: equal steps, and equal seconds

Equal seconds are those that the cheapest kind needs for all its steps. Of the other kinds, the checkpoint nearest to
them is evaluated; its learning rate had not yet fallen to 0.

OUT/PAIR has cost.json, evaluation-seedN.json, and a folder KIND-seedN with the training config, log, checkpoints and
cell.json of each training. What is finished is not repeated, and an interrupted training resumes: run the same command
again. With OMP_NUM_THREADS=1 two commands for different kinds or seeds can run at once.
"""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle.arguments import positive
from eagle.train.settings import find_config
from experiments.common import add_parts, caption
from experiments.training_study import DEEPSPEED, claim, config_of, plan, spread, write_questions
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import read_json

PAIRS = ("llava", "qwen2vl")
PARTS = ("cost", "train", "evaluate", "table")
CHECKPOINTS = 16
"""Of a training, at equal distances."""
MIX = {"text_share": 0.0, "image_start": 0.7, "image_end": 0.7}


@dataclass(frozen=True)
class Kind:
    """A kind of draft. ``head``: its ``--draft-kind`` in training. ``sections``: further keys of its training config;
    ``train``: of the section "train"."""

    name: str
    what: str
    head: str
    sections: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


KINDS = (
    Kind("msd", "features of one layer, two rollout steps (the shipped recipe)", "msd"),
    Kind("block", "8 tokens in one forward", "block", {"block": {"size": 8}}),
    Kind("eagle3-decoupled", "image rows are projected features", "eagle3", {"msd": {"image_rows": "feature"}}),
    Kind("eagle3-placeholder", "image rows are the placeholder", "eagle3", {"msd": {"image_rows": "token"}}),
    Kind(
        "eagle3-compressed",
        "16 merged rows of a picture",
        "eagle3",
        {"msd": {"image_rows": "feature", "image_tokens": 16}},
    ),
    Kind("vispec", "one learnt row of a picture and a global vector", "vispec", {"vispec": {"queries": 2}}),
)


def choose(names: Sequence[str]) -> list[Kind]:
    """The kinds of these names, in the order of `KINDS`."""
    return [kind for kind in KINDS if kind.name in names]


@dataclass(frozen=True)
class Study(ABC):
    """Kinds of drafts of one base. ``folder``: of the results; ``data``: the folder of hidden states of each set,
    "text" and "image"; ``deepspeed``: the config with the batch sizes; ``config``: a training config of MSD;
    ``kinds``: all that are compared."""

    folder: Path
    base: str
    data: Mapping[str, Path]
    deepspeed: str
    config: dict[str, Any]
    kinds: Sequence[Kind]

    @abstractmethod
    def shared(self, seed: int) -> dict[str, Any]:
        """Training settings of all kinds."""

    @abstractmethod
    def epochs_of(self, kind: Kind) -> int:
        """The length of a training."""

    def cell(self, kind: Kind, seed: int) -> Path:
        """The folder of a training."""
        return self.folder / f"{kind.name}-seed{seed}"

    @property
    def cost(self) -> Path:
        return self.folder / "cost.json"

    def costs(self) -> dict[str, float]:
        """Seconds of a training step of each kind that was measured."""
        return read_json(self.cost, "costs of a step")["seconds"] if self.cost.is_file() else {}

    def cost_of(self, kind: Kind) -> float:
        """Seconds of a training step.

        Raises:
            UserError: they are not measured.
        """
        if (found := self.costs().get(kind.name)) is None:
            fix = "run the part 'cost' first"
            raise UserError(f"the cost of a step of {kind.name} is not measured", where=self.cost, fix=fix)
        return found


@dataclass(frozen=True)
class PocketStudy(Study):
    """Of one pocket pair. ``steps``: of every training, ``epochs`` whole ones; ``tokens``: of an answer at most."""

    epochs: int
    steps: int
    questions: Path
    tokens: int

    def shared(self, seed: int) -> dict[str, Any]:
        return {
            **MIX, "seed": seed, "save_every": max(1, self.steps // CHECKPOINTS), "keep_last": self.steps,
            "validate_every": self.steps, "validation_limit": 24, "log_every": 5,
        }  # fmt: skip

    def epochs_of(self, kind: Kind) -> int:
        return self.epochs

    def evaluation(self, seed: int) -> Path:
        return self.folder / f"evaluation-seed{seed}.json"


def main() -> None:
    options = parse_args()
    parts = options.parts or PARTS
    if set(parts) != {"table"}:
        study, kinds = prepare(options), choose(options.kinds)
        from experiments import draft_kinds_run as run  # imports torch

        if "cost" in parts:
            run.measure_costs(study, kinds)
        for seed in options.seeds:
            for kind in kinds if "train" in parts else ():
                run.train_cell(study, kind, seed)
            if "evaluate" in parts:
                run.evaluate(study, seed)
    if "table" in parts:
        print(tables(options.out))


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m experiments.draft_kinds", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [kind.name for kind in KINDS]
    add = parser.add_argument
    add_parts(parser, PARTS)
    add("--pair", choices=PAIRS, default="llava", help="pocket pair (default %(default)s)")
    add("--hidden", type=Path, metavar="DIR", help="hidden states in DIR/hidden_t and DIR/hidden_v, with those that "
        "enter the layers of an EAGLE-3 head; for all parts but table")  # fmt: skip
    add("--out", type=Path, default=Path("outputs/draft_kinds"), help="(default %(default)s)")
    add("--kinds", nargs="+", choices=names, default=names, help="these alone (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    add("--steps", type=positive, default=240, help="of each training, rounded to whole epochs (default %(default)s)")
    add("--questions", type=positive, default=16, help="held-out questions with pictures (default %(default)s)")
    add("--max-new-tokens", type=positive, default=64, help="(default %(default)s)")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> PocketStudy:
    """Reads the hidden states' sizes, and claims the pair's folder for these settings."""
    if options.hidden is None:
        raise UserError("no hidden states", where="--hidden", fix="name their folder; --help has the command")
    base = f"pocket/{options.pair}"
    config = read_json(find_config(config_of(base)), "training config")
    epochs, steps = plan(options.hidden, config, options.steps)
    folder = options.out / options.pair
    settings = {"base": base, "hidden": str(options.hidden), "config": config, "steps": steps,
                "questions": options.questions, "max_new_tokens": options.max_new_tokens}  # fmt: skip
    claim(folder, settings)
    questions = write_questions(options.questions, folder / "questions.jsonl")
    data = {"text": options.hidden / "hidden_t", "image": options.hidden / "hidden_v"}
    return PocketStudy(folder, base, data, DEEPSPEED, config, KINDS, epochs, steps, questions, options.max_new_tokens)


Row = Mapping[str, Any]
"""What is known of one kind with one seed: of its training, its costs and its evaluation."""
EQUAL = ("steps", "seconds")

COLUMNS = {
    "step": ("step", 0),
    "training, s": ("seconds", 0),
    "simulated τ": ("simulated", 2),
    "τ, tree": ("tau", 2),
    "τ, chain": ("tau_chain", 2),
    "drafting, % of a cycle": ("draft_percent", 1),
    "draft, ms": ("draft_ms", 1),
    "verification, ms": ("verify_ms", 1),
    "whole request": ("speedup", 2),
    "after the first token": ("after_first_token", 2),
    "on disk, MB": ("megabytes", 2),
}
"""Titles of columns, with the key of a `Row` and the digits that are shown. The simulated τ is of a chain, on
validation samples with pictures at the end of the training."""


def tables(out: Path) -> str:
    """Markdown tables of each pair that has figures.

    Raises:
        UserError: no pair has any.
    """
    parts = []
    for folder in (out / pair for pair in PAIRS):
        cells = [read_json(file, "record of a training") for file in sorted(folder.glob("*/cell.json"))]
        for equal in EQUAL if cells else ():
            parts.append(f"{folder.name}, equal {equal}\n\n{table(rows_of(folder, cells, equal))}")
        parts += [note(file) for file in sorted(folder.glob("evaluation-seed*.json"))]
    if not parts:
        raise UserError("no trained draft", where=out, fix="run the study first, or give its --out")
    return "\n\n".join(parts)


def rows_of(folder: Path, cells: Sequence[Row], equal: str) -> list[Row]:
    """The cells of a pair, each with its evaluation after equal ``equal`` where there is one, in the order of
    `KINDS`."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for file in folder.glob("evaluation-seed*.json"):
        record = read_json(file, "an evaluation")
        found |= {(row["kind"], row["seed"]): row for row in record["rows"] if equal in row["equal"]}
    rows: list[Mapping[str, Any]] = []
    for kind, cell in ((kind, cell) for kind in KINDS for cell in cells if cell["kind"] == kind.name):
        row = {**cell, "megabytes": cell["bytes"] / 1e6, **found.get((kind.name, cell["seed"]), {})}
        rows.append(row | {"simulated": cell["simulated_tau"].get("image") if equal == "steps" else None})
    return rows


def table(rows: Sequence[Row], columns: Mapping[str, tuple[str, int]] = COLUMNS) -> str:
    """One line for each kind: mean over seeds, and their range; with the equal answers if there are any figures of
    them."""
    titles = [*columns, "equal answers"] if any("identical" in row for row in rows) else [*columns]
    lines = [f"| {' | '.join(['draft', 'seeds', *titles])} |", f"|---|---|{'---:|' * len(titles)}"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        values = [spread([row.get(key) for row in own], digits) for key, digits in columns.values()]
        answers = ", ".join(f"{row['identical']} of {row['answers']}" for row in own if "identical" in row)
        cells = [kind, ", ".join(str(row["seed"]) for row in own), *values, answers]
        lines.append(f"| {' | '.join(cells[: 2 + len(titles)])} |")
    return "\n".join(lines)


def note(file: Path) -> str:
    """What an evaluation was, in one line."""
    record = read_json(file, "an evaluation")
    return (
        f"{file.stem}: {record['questions']} held-out questions with pictures, at most {record['max_new_tokens']} new "
        f"tokens, greedy, tree {record['tree']}, chain {record['chain']}; baselines {', '.join(record['baselines'])}. "
        f"{caption(record)}."
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))

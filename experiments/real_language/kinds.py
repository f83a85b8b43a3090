"""Each kind of draft for SmolLM2-135M-Instruct after equal seconds of training: τ, speed and equal answers on the
held-out prompts, greedy and at T = 1.

    WORK=W experiments/real_language/train.sh --epochs 6 --validation-limit 8      # base, answers, MSD draft
    WORK=W FEATURE_LAYERS=auto STATES_ONLY=1 experiments/real_language/train.sh    # what an EAGLE-3 head reads
    python -m experiments.real_language.kinds --work W

The MSD draft of train.sh is the measure: every other kind trains for as many whole epochs as come nearest to its
seconds, on the same answers, by the cost of a step that is measured here. Its learning rate, batches and validation are
those of the MSD draft. All heads propose the same number of tokens, the most frequent ones of the answers.

Parts, all of them by default:

    cost      seconds of a training step of each kind, in turns in one process
    train     each kind; the drafts are W/SmolLM2-135M-Instruct-KIND
    evaluate  all drafts that are there and plain decoding in one interleaved run, first greedy, then at T = 1
    table     prints the tables, of what is there

W/kinds has cost.json, greedy.json, sampled.json, and a folder KIND-seedN with the training config, log, checkpoints and
cell.json of each training. What is finished is not repeated, and an interrupted training resumes: run the same command
again. With OMP_NUM_THREADS=1 two commands for different kinds can train at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle.arguments import positive
from experiments.common import add_parts, caption
from experiments.draft_kinds import Kind, Row, table
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import read_json

NAME = "SmolLM2-135M-Instruct"
PARTS = ("cost", "train", "evaluate", "table")
DEEPSPEED = Path(__file__).parent / "ds_config.json"
MSD = Kind("msd", "features of one layer, one rollout step (train.sh)", "msd")
KINDS = (
    MSD,
    Kind("eagle3", "three layers' features, seven rollout steps (the recipe)", "eagle3"),
    Kind("eagle3-3", "with three rollout steps", "eagle3", train={"rollout_steps": 3}),
    Kind("block", "8 tokens in one forward", "block", {"block": {"size": 8}}),
    Kind("block-4", "4 tokens in one forward", "block", {"block": {"size": 4}}, {"simulated_depth": 4}),
)
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
SEED = 1
"""Of sampled answers."""


def main() -> None:
    options = parse_args()
    parts = options.parts or PARTS
    out = options.out or options.work / "kinds"
    if set(parts) != {"table"}:
        from experiments.draft_kinds_run import measure_costs  # imports torch
        from experiments.real_language import kinds_run as run

        study = run.prepare(options.work, out)
        kinds = [kind for kind in KINDS if kind.name in options.kinds]
        if "cost" in parts:
            measure_costs(study, [MSD, *kinds])
        for kind in kinds if "train" in parts else ():
            run.train(study, kind)
        for name in TEMPERATURES if "evaluate" in parts else ():
            run.evaluate(study, name, options.questions, options.max_new_tokens, options.compiled)
    if "table" in parts:
        print(tables(out))


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m experiments.real_language.kinds", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [kind.name for kind in KINDS if kind is not MSD]
    add = parser.add_argument
    add_parts(parser, PARTS)
    add("--work", type=Path, default=Path("outputs/smollm2"), metavar="W", help="of train.sh (default %(default)s)")
    add("--out", type=Path, metavar="DIR", help="of the results (default: W/kinds)")
    add("--kinds", nargs="+", choices=names, default=names, help="to train: these alone (default: all)")
    add("--questions", type=positive, default=16, help="held-out prompts, the first ones (default %(default)s)")
    add("--max-new-tokens", type=positive, default=96, help="(default %(default)s)")
    add("--compiled", action="store_true", help="also compiled plain decoding as a baseline")
    return parser.parse_args()


TRAINING = {
    "steps": ("step", 0),
    "training, s": ("seconds", 0),
    "top-1": ("top1", 3),
    "simulated τ": ("simulated", 2),
    "on disk, MB": ("megabytes", 2),
}
"""Titles of columns, with the key of a `Row` and the digits that are shown. Top-1 and the simulated τ of a chain are of
the validation samples at the end of the training."""
DECODING = {
    "τ, tree": ("tau", 2),
    "chain": ("tau_chain", 2),
    "automatic": ("tau_auto", 2),
    "drafting, % of a cycle": ("draft_percent", 1),
    "draft, ms": ("draft_ms", 1),
    "verification, ms": ("verify_ms", 1),
    "whole request, tree": ("speedup", 2),
    "chain, whole": ("speedup_chain", 2),
    "automatic, whole": ("speedup_auto", 2),
    "after the first token, tree": ("after_first_token", 2),
    "chain, after": ("after_first_token_chain", 2),
    "automatic, after": ("after_first_token_auto", 2),
}
"""As `TRAINING`. Speed-ups are over the strongest plain decoding; costs of a cycle are those of the tree."""


def tables(out: Path) -> str:
    """Markdown: the trainings, and each evaluation that is there.

    Raises:
        UserError: there is nothing yet.
    """
    files = [file for file in (out / f"{name}.json" for name in TEMPERATURES) if file.is_file()]
    records = {file.stem: read_json(file, "an evaluation") for file in files}
    rows = {row["kind"]: row for row in [*trainings(out), *(row for each in records.values() for row in each["rows"])]}
    if not rows:
        raise UserError("no trained draft", where=out, fix="run the other parts first, or give --work or --out")
    shown = ("kind", "seed", *(key for key, _ in TRAINING.values()))
    ordered = [rows[kind.name] for kind in KINDS if kind.name in rows]
    found = [table([{key: row[key] for key in shown} for row in ordered], TRAINING)]
    for name, record in records.items():
        found += [note(name, record), table([totals(row) for row in record["rows"]], DECODING)]
        found.append(acceptance(record["rows"]))
    return "\n\n".join(found)


def trainings(out: Path) -> list[Row]:
    """What the records of finished trainings say."""
    cells = [read_json(file, "record of a training") for file in sorted(out.glob("*/cell.json"))]
    seconds = read_json(out / "cost.json", "costs of a step")["seconds"] if cells else {}
    return [
        {**cell, "step": cell["steps"], "seconds": cell["steps"] * seconds[cell["kind"]], "top1": cell["top1"]["text"],
         "simulated": cell["simulated_tau"]["text"], "megabytes": cell["bytes"] / 1e6} for cell in cells
    ]  # fmt: skip


def totals(row: Row) -> Row:
    """The row with the numbers of answers, and of equal ones, of all trees together."""
    return {
        **row,
        **{key: sum(row[f"{key}{tree}"] for tree in ("", "_chain", "_auto")) for key in ("identical", "answers")},
    }


def acceptance(rows: list[Row]) -> str:
    """Share of cycles that accepted at least so many drafted tokens."""
    shown = [(f"{row['kind']}, {tree}", row[key]) for row in rows for tree, key in
             (("tree", "acceptance"), ("chain", "acceptance_chain"))]  # fmt: skip
    longest = max(len(shares) for _, shares in shown)
    lines = [f"| accepted at least | {' | '.join(map(str, range(1, longest + 1)))} |", f"|---|{'---:|' * longest}"]
    for name, shares in shown:
        cells = [f"{share:.3f}" for share in shares] + [""] * (longest - len(shares))
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def note(name: str, record: Mapping[str, Any]) -> str:
    """What an evaluation was, in one line."""
    speeds = ", ".join(f"{plain} {speed:.1f}" for plain, speed in record["baselines"].items())
    return (
        f"{name}: {record['questions']} held-out prompts, at most {record['max_new_tokens']} new tokens, T = "
        f"{record['temperature']:g}; tree {record['tree']}, chain {record['chain']}, automatic {record['auto']}; plain "
        f"decoding after the first token, tokens/s: {speeds}. {caption(record)}."
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))

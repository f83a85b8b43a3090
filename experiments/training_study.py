"""The paper's claims about training, in miniature: each way of training for the same number of steps, then τ and speed.

    python -m experiments.training_study                                  on pocket/llava, about 14 trainings
    python -m experiments.training_study --base pocket/qwen2vl
    python -m experiments.training_study --quick --out outputs/try        to see that it runs

Cells (`experiments.study_cells`): two-stage, not decoupled, text alone, pictures alone, mixed from the start, and
two-stage with two and three steps on the draft's own outputs; each with every seed. A cell is trained by the pipeline's
own `eagle.train.main_deepspeed` in one process and measured by `msd bench` on held-out pictures, with the fixed tree
and with a chain.

OUT/RUN/ has the training config, checkpoints, bench.json and cell.json of each run; OUT/ results.json, results.md,
results.png. Whatever is there is not done again, and an interrupted training resumes: start the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.hidden_states.index import INDEX
from eagle.hidden_states.shards import ShardDataset
from eagle.questions import read_questions
from eagle.train.curriculum import IMAGE, TEXT
from eagle.train.engine import read_deepspeed_config
from eagle.train.schedule import BatchSizes
from eagle.train.settings import TrainConfig, find_config
from eagle.train.trainer import TrainingData
from experiments.steps import REPO, about, bench, chain_tau, claim, launch
from experiments.study_cells import REFERENCE, Cell, choose, training_config
from experiments.study_report import write_report
from llava.errors import UserError, run_cli
from llava.files import atomic_write, read_json, write_json


@dataclass(frozen=True)
class Study:
    """What all cells share. ``states``: folder with ``hidden_t`` and ``hidden_v``; ``steps``: of every training."""

    out: Path
    base: str
    states: Path
    config: dict[str, Any]
    deepspeed: str
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
            write_report(study.out, rows, about())
    print((study.out / "results.md").read_text(encoding="utf-8"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="pocket/llava", help="base model (default %(default)s)")
    add("--config", help="training config that all cells start from (default: the shipped one of a pocket base)")
    add("--deepspeed-config", default="pocket_ds_config.json", help="batch sizes, precision (default %(default)s)")
    add("--data", type=Path, metavar="FOLDER", help="hidden states in FOLDER/hidden_t and FOLDER/hidden_v "
        "(default: those of pocket/recipe/train_draft.sh, made if they are not there)")  # fmt: skip
    add("--heldout", type=Path, default=Path("pocket/data/heldout.jsonl"), help="questions (default %(default)s)")
    add("--questions", type=int, help="held-out questions with pictures that are asked (default 48)")
    add("--max-new-tokens", type=int, help="(default 128)")
    add("--steps", type=int, help="steps of each training, rounded to whole epochs (default 1200)")
    add("--text-share", type=float, default=0.5, help="of the two-stage cells (default %(default)s, as published)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    add("--cells", nargs="+", default=[], help="these alone (default: all)")
    add("--out", type=Path, help="(default: outputs/training_study-BASE)")
    add("--quick", action="store_true", help="two epochs on a little data, two questions: shows that it runs")
    options = parser.parse_args()
    usual = (2, 16, 1) if options.quick else (48, 128, 1200)
    for name, value in zip(("questions", "max_new_tokens", "steps"), usual, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.out = options.out or Path("outputs") / f"training_study-{Path(options.base).name}"
    return options


def prepare(options: argparse.Namespace) -> Study:
    """Finds or makes the data, and claims the folder for these settings."""
    config = read_json(find_config(options.config or config_of(options.base)), "training config")
    states = options.data or hidden_states(options.base, options.out, options.quick)
    if options.quick:
        config = {**config, "train": {**config.get("train", {}), "log_every": 1, "validation_limit": 2}}
    epochs, steps = plan(states, config, options.deepspeed_config, options.steps)
    depth = config.get("train", {}).get("simulated_depth", TrainConfig().simulated_depth)
    shared = {"epochs": epochs, "text_share": options.text_share, "simulated_depth": depth, "keep_last": 1}
    settings = {"base": options.base, "data": str(states), "config": config, "shared": shared, "steps": steps,
                "deepspeed": options.deepspeed_config, "heldout": str(options.heldout),
                "questions": options.questions, "max_new_tokens": options.max_new_tokens}  # fmt: skip
    claim(options.out, settings)
    questions = write_questions(options.heldout, options.questions, options.out / "questions.jsonl")
    print(f"{epochs} epochs, {steps} steps a training, {options.questions} questions: {options.out}", flush=True)
    return Study(options.out, options.base, states, config, options.deepspeed_config, shared, steps, questions,
                 options.max_new_tokens)  # fmt: skip


def config_of(base: str) -> str:
    """The shipped training config of a pocket base."""
    name = f"pocket_{Path(base).name}_config.json"
    if not find_config(name).is_file():
        raise UserError("no training config is shipped for this base", where=base, fix="give --config")
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
        script = ["bash", str(REPO / "pocket" / "train_draft.sh")]
        status = subprocess.run(script, env={**os.environ, **made, **amounts}, check=False).returncode
        if status:
            raise UserError(f"pocket/recipe/train_draft.sh ended with status {status}", fix="see its last lines")
    return folder


def plan(states: Path, config: dict[str, Any], deepspeed: str, steps: int) -> tuple[int, int]:
    """(epochs, steps) of a training: whole epochs, at least two, as near to ``steps`` as they come."""
    sets = {TEXT: ShardDataset(states / "hidden_t"), IMAGE: ShardDataset(states / "hidden_v")}
    train = TrainConfig.from_dict(config.get("train", {}), "training config")
    sizes = BatchSizes.from_deepspeed(read_deepspeed_config(deepspeed), 1, where=deepspeed)
    per_epoch = TrainingData.split(sets, train).schedule(sizes, train).steps_per_epoch
    epochs = max(2, round(steps / per_epoch))
    return epochs, epochs * per_epoch


def write_questions(source: Path, count: int, file: Path) -> Path:
    """The first ``count`` questions about pictures as a question file."""
    asked = [question for question in read_questions(source) if question.images][:count]
    if not asked:
        raise UserError("no question with a picture", where=source, fix="check --heldout")
    rows = [{"id": each.id, "question": each.question, "answer": each.answer,
             "images": [os.path.relpath(image, file.parent) for image in each.images]} for each in asked]  # fmt: skip
    with atomic_write(file) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
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
        argv += ["--deepspeed_config", study.deepspeed, "--tracker", "none", "--resume"]
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
        "top1": {name: values["top1"] for name, values in last["results"].items()}, **about(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_cli(main))

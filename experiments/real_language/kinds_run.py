"""Trainings and measurements of `experiments.real_language.kinds`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from eagle.decode.tree_config import TreeConfig
from eagle.drafts.config import DRAFT_VOCAB_FILE, DraftConfig
from eagle.drafts.draft_vocab import read_draft_vocab, write_draft_vocab
from eagle.families.draft_config import draft_config_of
from eagle.hidden_states.index import INDEX
from eagle.questions import read_questions
from eagle.train.settings import SECTION, TrainConfig
from experiments.common import run_record
from experiments.draft_kinds import Kind, Study
from experiments.draft_kinds_run import compare, train_cell
from experiments.real_language.kinds import DEEPSPEED, KINDS, MSD, NAME, SEED, TEMPERATURES
from experiments.real_language.prompts import HELD_OUT
from experiments.training_study import claim
from llava.errors import UserError
from llava.files import atomic_folder, read_json, write_json

CHAIN = TreeConfig(3, 1, 5)
SAVE_MINUTES = 4.0
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class LanguageStudy(Study):
    """``work``: the folder of train.sh; ``epochs``, ``steps``, ``seed``: of the MSD draft's training."""

    work: Path
    epochs: int
    steps: int
    seed: int

    def shared(self, seed: int) -> dict[str, Any]:
        return {"seed": seed, "save_every": 0, "save_minutes": SAVE_MINUTES}

    def epochs_of(self, kind: Kind) -> int:
        return max(1, round(self.epochs * self.cost_of(MSD) / self.cost_of(kind)))

    def draft(self, kind: Kind) -> Path:
        """The folder of a finished draft."""
        return self.work / f"{NAME}-{kind.name}"

    def trained(self) -> list[Kind]:
        """The kinds whose draft is there; errors as of `is_trained`."""
        return [kind for kind in self.kinds if self.is_trained(kind)]

    def is_trained(self, kind: Kind) -> bool:
        """Whether its draft is there.

        Raises:
            UserError: it is there, but not of the training in ``folder``.
        """
        draft, final = self.draft(kind), self.cell(kind, self.seed) / "checkpoints" / "final"
        if not (draft / "config.json").is_file():
            return False
        made = [each.read_bytes() if (each := where / PROVENANCE).is_file() else None for where in (draft, final)]
        if kind != MSD and (made[0] is None or made[0] != made[1]):
            raise UserError(f"a draft of another training than the one in {final.parent.parent}", draft, "move it away")
        return True

    def steps_of(self, kind: Kind) -> int:
        """Of a finished training."""
        return self.steps if kind == MSD else read_json(self.cell(kind, self.seed) / "cell.json")["steps"]


def prepare(work: Path, out: Path) -> LanguageStudy:
    """Reads how the MSD draft was trained, and claims ``out`` for that.

    Args:
        work: the folder of train.sh.

    Raises:
        UserError: something of train.sh is missing, or ``out`` is of another MSD draft.
    """
    base, msd, states = work / NAME, work / f"{NAME}-msd", work / "hidden-layers"
    for file in (msd / PROVENANCE, msd / DRAFT_VOCAB_FILE, states / INDEX):
        if not file.is_file():
            raise UserError("no such file", where=file, fix="run experiments/real_language/train.sh as --help says")
    made = read_json(msd / PROVENANCE, "provenance of the MSD draft")
    settings: dict[str, Any] = made["settings"]
    if made["step"] < made["total_steps"]:
        fix = "run experiments/real_language/train.sh again"
        raise UserError(f"trained for {made['step']} of {made['total_steps']} steps", where=msd, fix=fix)
    vocabulary = len(read_draft_vocab(msd, DraftConfig.from_json(msd)))
    config = training_config(base, settings)
    claim(out, {"base": str(base), "hidden": str(states), "config": config, "steps": made["step"],
                "vocabulary": vocabulary})  # fmt: skip
    trimmed = {"draft_vocab_size": vocabulary}
    kinds = [replace(kind, sections=trimmed) if kind.head == "eagle3" else kind for kind in KINDS]
    return LanguageStudy(
        out, str(base), {"text": states}, str(DEEPSPEED), config, kinds, work, settings["epochs"], made["step"],
        settings["seed"],
    )  # fmt: skip


def training_config(base: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A training config with the shape of a new MSD draft. ``settings``: of a training, by its provenance."""
    known = {each.name for each in fields(TrainConfig)} - {"epochs", "seed", "max_steps"}
    section = {name: value for name, value in settings.items() if name in known}
    return {**draft_config_of(base).published, SECTION: section}


def train(study: LanguageStudy, kind: Kind) -> None:
    """Trains a kind and writes its draft, unless that is done. The vocabulary of a block head is that of the MSD draft;
    an EAGLE-3 head chose its own."""
    kind = next(each for each in study.kinds if each.name == kind.name)
    if study.is_trained(kind):
        return
    train_cell(study, kind, study.seed)
    with atomic_folder(study.draft(kind)) as temporary:
        shutil.copytree(study.cell(kind, study.seed) / "checkpoints" / "final", temporary, dirs_exist_ok=True)
        if kind.head == "block":
            msd = study.draft(MSD)
            write_draft_vocab(temporary, read_draft_vocab(msd, DraftConfig.from_json(msd)))


def evaluate(study: LanguageStudy, name: str, count: int, tokens: int, compiled: bool) -> None:
    """Writes the figures of all drafts that are there, unless they were measured.

    Args:
        name: of `TEMPERATURES`.
        count: prompts.
        tokens: of an answer at most.
        compiled: also compiled plain decoding.

    Raises:
        UserError: they were measured in another way.
    """
    kinds, file = study.trained(), study.folder / f"{name}.json"
    asked = {"questions": count, "max_new_tokens": tokens, "compiled": compiled}
    names = [kind.name for kind in kinds]
    if file.is_file():
        measured = read_json(file, "an evaluation")
        for key, value in asked.items():
            if measured[key] != value:
                fix = "give the same setting, or move the file away"
                raise UserError(f"this was measured with {key}={measured[key]}, not {value}", where=file, fix=fix)
        if measured["kinds"] == names:
            return
    settings: dict[str, Any] = {"max_new_tokens": tokens, "temperature": TEMPERATURES[name]}
    if settings["temperature"]:
        settings["seed"] = SEED
    trees = {"chain": CHAIN, "auto": TreeConfig.auto("cpu")}
    heads = [(known(study, kind), study.draft(kind)) for kind in kinds]
    questions = read_questions(HELD_OUT, count)
    found = compare(study.base, heads, questions, settings, trees, name, compiled or None)
    write_json(file, {**found, **asked, "kinds": names, **run_record()})


def known(study: LanguageStudy, kind: Kind) -> dict[str, Any]:
    """What is known of a draft before it is measured."""
    step, checkpoints = study.steps_of(kind), study.cell(kind, study.seed) / "checkpoints"
    if kind == MSD:
        checkpoints = study.work / "checkpoints"
    last = read_json(checkpoints / "training.json", "history of a training")["validations"][-1]["results"]["text"]
    return {
        "kind": kind.name, "what": kind.what, "seed": study.seed, "step": step, "seconds": step * study.cost_of(kind),
        "top1": last["top1"], "simulated": last["tau"],
        "megabytes": sum(path.stat().st_size for path in study.draft(kind).iterdir()) / 1e6,
    }  # fmt: skip

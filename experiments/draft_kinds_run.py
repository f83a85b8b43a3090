"""Trainings and measurements of `experiments.draft_kinds`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from eagle.bench_report import Bench
from eagle.benchmark import Contestant, baselines, interleave_with_bar, with_engine
from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families.base_weights import load_base_tensors
from eagle.families.draft_config import eagle3_config_of, vispec_config_of
from eagle.questions import read_questions
from eagle.train.collate import NO_COMPRESSION, Batch
from eagle.train.dataset import batches, load_stored
from eagle.train.engine import Engine, read_deepspeed_config, suit_device
from eagle.train.run import build_engine, build_objective, read_layers
from eagle.train.schedule import IMAGE, TEXT, BatchSizes, epoch_items, micro_batches
from eagle.train.settings import EAGLE3_RECIPE, SECTION, VISPEC_RECIPE, read_config
from experiments.common import run_record
from experiments.draft_kinds import KINDS, Kind, Study
from experiments.training_study import DEEPSPEED, launch
from llava.errors import UserError
from llava.files import read_json, write_json

ROUNDS = 8
"""Training steps of each kind whose time is taken."""
CHAIN = 6
"""Drafted tokens of the chain."""


def write_config(study: Study, kind: Kind, seed: int, file: Path) -> Path:
    """Writes the training config of a kind. Only MSD has the loss weights, noise and rollout of the shipped config; the
    other kinds have those of their own recipes."""
    shape = {key: value for key, value in study.config.items() if key != SECTION}
    train = study.config[SECTION]
    if kind.head == "eagle3":
        shape = eagle3_config_of(study.base).published
    if kind.head == "vispec":
        shape = vispec_config_of(study.base).published
    if kind.head != "msd":
        own = {**EAGLE3_RECIPE, **(VISPEC_RECIPE if kind.head == "vispec" else {})}
        train = {key: value for key, value in train.items() if key not in own}
    write_json(file, {**shape, **kind.sections, SECTION: {**train, **study.shared(seed)}})
    return file


def train_cell(study: Study, kind: Kind, seed: int) -> None:
    """Trains one kind with one seed, unless that is done."""
    folder = study.cell(kind, seed)
    record, checkpoints = folder / "cell.json", folder / "checkpoints"
    if record.is_file():
        return
    print(f"{study.base}: {kind.name}, seed {seed}, {study.steps} steps", flush=True)
    config = write_config(study, kind, seed, folder / "config.json")
    argv = ["--basepath", study.base, "--cpdir", str(checkpoints), "--config", str(config), "--resume"]
    argv += ["--tmpdir_t", str(study.states / "hidden_t"), "--tmpdir_v", str(study.states / "hidden_v")]
    argv += ["--deepspeed_config", DEEPSPEED, "--tracker", "none"]
    launch("eagle.train.main_deepspeed", argv, folder / "log.txt")
    history = read_json(checkpoints / "training.json", "history of a training")
    last, files = history["validations"][-1]["results"], (checkpoints / "final").iterdir()
    row = {
        "kind": kind.name, "what": kind.what, "seed": seed, "steps": history["steps"][-1]["step"],
        "bytes": sum(file.stat().st_size for file in files),
        "simulated_tau": {name: values["tau"] for name, values in last.items()}, **run_record(),
    }  # fmt: skip
    write_json(record, row)


def measure_costs(study: Study, kinds: Sequence[Kind]) -> None:
    """Writes the seconds of a training step of each kind, unless they are there."""
    known = read_json(study.cost, "costs of a step")["seconds"] if study.cost.is_file() else {}
    names = {kind.name for kind in kinds}
    if names <= known.keys():
        return
    measured = [kind for kind in KINDS if kind.name in names | known.keys()]
    print(f"{study.base}: cost of a step of {', '.join(kind.name for kind in measured)}", flush=True)
    ready = {kind.name: ready_to_train(study, kind) for kind in measured}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(-1, ROUNDS):  # the first one warms up
        for name, (engine, loaded) in ready.items():
            start = perf_counter()
            engine.step([loaded[number % len(loaded)]], study.config[SECTION]["learning_rate"])
            if number >= 0:
                seconds[name].append(perf_counter() - start)
    found = {name: median(each) for name, each in seconds.items()}
    ranges = {name: [min(each), max(each)] for name, each in seconds.items()}
    write_json(study.cost, {"seconds": found, "range": ranges, "rounds": ROUNDS, **run_record()})
    print(", ".join(f"{name} {value:.2f} s" for name, value in found.items()), flush=True)


def ready_to_train(study: Study, kind: Kind) -> tuple[Engine, list[Batch]]:
    """A new draft in its engine, and its first batches. They have the same samples for all kinds."""
    draft, config = read_config(write_config(study, kind, 0, study.folder / "costs" / f"{kind.name}.json"))
    base = load_base_tensors(study.base)
    folders: dict[str, str | None] = {TEXT: str(study.states / "hidden_t"), IMAGE: str(study.states / "hidden_v")}
    data = load_stored(folders, draft.hidden_size, base, config, read_layers(draft, study.base))
    deepspeed = read_deepspeed_config(DEEPSPEED)
    sizes = BatchSizes.from_deepspeed(deepspeed, 1, where=DEEPSPEED)
    objective = build_objective(argparse.Namespace(init=None), draft, base, config, data, main=False)
    engine = build_engine(objective, config, suit_device(deepspeed, main=False), sizes)
    items = epoch_items(
        data.schedule(sizes, config), 0, config.text_share, config.seed, config.image_start, config.image_end
    )
    head = engine.objective.draft
    loaded = batches(
        data.training,
        micro_batches(items, sizes, rank=0)[:ROUNDS],
        vocab_size=head.config.vocab_size,
        max_length=config.max_length,
        noise=config.noise,
        compression=head.compression or NO_COMPRESSION,
        positions=head.positions,
        image_ids=head.embeds_image_ids,
        queries=head.image_queries,
    )
    return engine, list(loaded)


def checkpoints_of(study: Study, kind: Kind, seed: int) -> dict[int, Path]:
    """The checkpoints of a training by their step."""
    return {int(path.name.partition("-")[2]): path for path in study.cell(kind, seed).glob("checkpoints/step-*")}


def chosen_steps(study: Study, kinds: Sequence[Kind], seed: int) -> dict[str, dict[int, list[str]]]:
    """Which checkpoints of each kind are evaluated: step → what it has equal with those of other kinds."""
    cost = read_json(study.cost, "costs of a step")["seconds"]
    budget = study.steps * min(cost[kind.name] for kind in kinds)
    chosen: dict[str, dict[int, list[str]]] = {}
    for kind in kinds:
        near = min(checkpoints_of(study, kind, seed), key=lambda step: abs(step * cost[kind.name] - budget))
        own = chosen[kind.name] = {study.steps: ["steps"]}
        own.setdefault(near, []).append("seconds")
    return chosen


def evaluate(study: Study, seed: int) -> None:
    """Writes the figures of all trained kinds of a seed, unless they are there.

    Raises:
        UserError: the costs of a step are not measured.
    """
    trained = [kind for kind in KINDS if (study.cell(kind, seed) / "cell.json").is_file()]
    file, names = study.evaluation(seed), [kind.name for kind in trained]
    if not trained or (file.is_file() and read_json(file, "an evaluation")["kinds"] == names):
        return
    if not study.cost.is_file() or not set(names) <= read_json(study.cost, "costs of a step")["seconds"].keys():
        raise UserError("the costs of a step are not measured", where=study.cost, fix="run the part 'cost' first")
    write_json(file, {"kinds": names, **measure(study, trained, seed), **run_record()})


def measure(study: Study, kinds: Sequence[Kind], seed: int) -> dict[str, Any]:
    """All checkpoints as trees and as chains, and plain decoding, in one interleaved run."""
    settings = {"max_new_tokens": study.tokens, "temperature": 0.0}
    chain = TreeConfig(CHAIN - 1, 1, CHAIN + 1)
    cost = read_json(study.cost, "costs of a step")["seconds"]
    plain = MSDModel.from_pretrained(study.base, dtype=torch.float32, tree="fixed")
    rivals = baselines([plain], settings)
    found: list[tuple[dict[str, Any], MSDModel, Contestant, Contestant]] = []
    for kind in kinds:
        saved = checkpoints_of(study, kind, seed)
        for step, equal in chosen_steps(study, kinds, seed)[kind.name].items():
            head = load_draft(saved[step], dtype=plain.dtype, device=plain.target.head_device)
            model = MSDModel(plain.target, head, tree="fixed")
            name = f"{kind.name}, step {step}"
            trees = (Contestant(name, with_engine(model, True, settings)),
                     Contestant(f"{name}, chain", with_engine(model, True, settings, chain)))  # fmt: skip
            row = {"kind": kind.name, "seed": seed, "equal": equal, "step": step, "seconds": step * cost[kind.name]}
            found.append((row, model, *trees))
    questions = read_questions(study.questions)
    runners = [*rivals, *(each for _, _, *trees in found for each in trees)]
    for _ in interleave_with_bar(runners, [[each] for each in questions], 1, f"seed {seed}", "question"):
        pass
    return {
        "rows": [row | figures(model, rivals, questions, *trees) for row, model, *trees in found],
        "questions": len(questions), "max_new_tokens": study.tokens, "tree": limits(plain.tree), "chain": limits(chain),
        "baselines": {rival.name: rival.total.decoding_speed for rival in rivals},
    }  # fmt: skip


def figures(
    model: MSDModel, rivals: Sequence[Contestant], questions: Sequence[Any], tree: Contestant, chain: Contestant
) -> dict[str, Any]:
    """The figures of one checkpoint; speeds are those of its tree."""
    bench, total = Bench(model, tree, rivals, questions), tree.total
    found = bench.figures(range(len(questions)))
    return {
        "tau": total.tau, "tau_chain": chain.total.tau, "acceptance": total.acceptance_by_position,
        "draft_percent": 100 * total.shares()["cycle"]["draft"],
        "draft_ms": total.phases_ms["draft"] / total.cycles, "verify_ms": total.phases_ms["verify"] / total.cycles,
        "speedup": found["speedup"], "after_first_token": found["after_first_token"]["speedup"],
        "identical": found["identical"]["answers"], "answers": found["identical"]["of"],
    }  # fmt: skip


def limits(tree: TreeConfig) -> str:
    """Depth, top-k and nodes of a tree."""
    return f"{tree.depth}/{tree.top_k}/{tree.total_tokens}"

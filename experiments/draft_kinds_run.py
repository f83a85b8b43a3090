"""Trainings and measurements of `experiments.draft_kinds`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
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
from eagle.questions import Question, read_questions
from eagle.train.collate import NO_COMPRESSION, Batch
from eagle.train.dataset import batches, load_stored
from eagle.train.engine import Engine, read_deepspeed_config, suit_device
from eagle.train.run import build_engine, build_objective, read_layers
from eagle.train.schedule import IMAGE, TEXT, BatchSizes, epoch_items, micro_batches
from eagle.train.settings import EAGLE3_RECIPE, SECTION, VISPEC_RECIPE, read_config
from experiments.common import run_record
from experiments.draft_kinds import Kind, PocketStudy, Study
from experiments.training_study import launch
from llava.files import read_json, write_json

ROUNDS = 8
"""Training steps of each kind whose time is taken."""
CHAIN = 6
"""Drafted tokens of the chain."""
SOURCES = {TEXT: "--tmpdir_t", IMAGE: "--tmpdir_v"}
"""The flag of each set of hidden states."""


def write_config(study: Study, kind: Kind, seed: int, file: Path, **more: Any) -> Path:
    """Writes the training config of a kind. Only MSD has the loss weights, noise and rollout of the study's config; the
    other kinds have those of their own recipes. ``more``: further training settings."""
    shape = {key: value for key, value in study.config.items() if key != SECTION}
    train = study.config[SECTION]
    if kind.head == "eagle3":
        shape = eagle3_config_of(study.base).published
    if kind.head == "vispec":
        shape = vispec_config_of(study.base).published
    if kind.head != "msd":
        own = {**EAGLE3_RECIPE, **(VISPEC_RECIPE if kind.head == "vispec" else {})}
        train = {key: value for key, value in train.items() if key not in own}
    write_json(file, {**shape, **kind.sections, SECTION: {**train, **study.shared(seed), **kind.train, **more}})
    return file


def train_cell(study: Study, kind: Kind, seed: int) -> None:
    """Trains one kind with one seed, unless that is done."""
    folder = study.cell(kind, seed)
    record, checkpoints = folder / "cell.json", folder / "checkpoints"
    if record.is_file():
        return
    epochs = study.epochs_of(kind)
    print(f"{study.base}: {kind.name}, seed {seed}, {epochs} epochs", flush=True)
    config = write_config(study, kind, seed, folder / "config.json", epochs=epochs)
    argv = ["--basepath", study.base, "--cpdir", str(checkpoints), "--config", str(config), "--resume"]
    for name, states in study.data.items():
        argv += [SOURCES[name], str(states)]
    argv += ["--deepspeed_config", study.deepspeed, "--tracker", "none"]
    launch("eagle.train.main_deepspeed", argv, folder / "log.txt")
    history = read_json(checkpoints / "training.json", "history of a training")
    last, files = history["validations"][-1]["results"], (checkpoints / "final").iterdir()
    row = {
        "kind": kind.name, "what": kind.what, "seed": seed, "steps": history["steps"][-1]["step"],
        "bytes": sum(file.stat().st_size for file in files),
        "simulated_tau": {name: values["tau"] for name, values in last.items()},
        "top1": {name: values["top1"] for name, values in last.items()}, **run_record(),
    }  # fmt: skip
    write_json(record, row)


def measure_costs(study: Study, kinds: Sequence[Kind]) -> None:
    """Writes the seconds of a training step of each kind, unless they are there."""
    known, names = study.costs().keys(), {kind.name for kind in kinds}
    if names <= known:
        return
    measured = [kind for kind in study.kinds if kind.name in names | known]
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
    folders: dict[str, str | None] = {name: str(folder) for name, folder in study.data.items()}
    data = load_stored(folders, draft.hidden_size, base, config, read_layers(draft, study.base))
    deepspeed = read_deepspeed_config(study.deepspeed)
    sizes = BatchSizes.from_deepspeed(deepspeed, 1, where=study.deepspeed)
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


def chosen_steps(study: PocketStudy, kinds: Sequence[Kind], seed: int) -> dict[str, dict[int, list[str]]]:
    """Which checkpoints of each kind are evaluated: step → what it has equal with those of other kinds."""
    cost = {kind.name: study.cost_of(kind) for kind in kinds}
    budget = study.steps * min(cost.values())
    chosen: dict[str, dict[int, list[str]]] = {}
    for kind in kinds:
        near = min(checkpoints_of(study, kind, seed), key=lambda step: abs(step * cost[kind.name] - budget))
        own = chosen[kind.name] = {study.steps: ["steps"]}
        own.setdefault(near, []).append("seconds")
    return chosen


def evaluate(study: PocketStudy, seed: int) -> None:
    """Writes the figures of all trained kinds of a seed, unless they are there.

    Raises:
        UserError: the costs of a step are not measured.
    """
    trained = [kind for kind in study.kinds if (study.cell(kind, seed) / "cell.json").is_file()]
    file, names = study.evaluation(seed), [kind.name for kind in trained]
    if not trained or (file.is_file() and read_json(file, "an evaluation")["kinds"] == names):
        return
    heads = []
    for name, steps in chosen_steps(study, trained, seed).items():
        kind = next(kind for kind in trained if kind.name == name)
        saved = checkpoints_of(study, kind, seed)
        for step, equal in steps.items():
            row = {"kind": name, "seed": seed, "equal": equal, "step": step, "seconds": step * study.cost_of(kind)}
            heads.append((row, saved[step]))
    trees = {"chain": TreeConfig(CHAIN - 1, 1, CHAIN + 1)}
    settings = {"max_new_tokens": study.tokens, "temperature": 0.0}
    found = compare(study.base, heads, read_questions(study.questions), settings, trees, f"seed {seed}")
    write_json(file, {"kinds": names, **found, **run_record()})


def compare(
    base: str,
    heads: Sequence[tuple[dict[str, Any], Path]],
    questions: Sequence[Question],
    settings: Mapping[str, Any],
    trees: Mapping[str, TreeConfig],
    title: str,
    compiled: bool | None = None,
) -> dict[str, Any]:
    """All heads with the fixed tree and with others, and plain decoding, in one interleaved run.

    Args:
        heads: what is known of each one, and its folder. The figures are added.
        settings: of `MSDModel.generate`.
        trees: other trees by their name.
        compiled: see `baselines`.
    """
    plain = MSDModel.from_pretrained(base, dtype=torch.float32, tree="fixed")
    rivals = baselines([plain], settings, compiled)
    found: list[tuple[dict[str, Any], MSDModel, dict[str, Contestant]]] = []
    for row, folder in heads:
        head = load_draft(folder, dtype=plain.dtype, device=plain.target.head_device)
        model, kind = MSDModel(plain.target, head, tree="fixed"), f"{row['kind']}, step {row['step']}"
        runs = {
            name: Contestant(f"{kind}, {name}", with_engine(model, True, settings, tree))
            for name, tree in {"tree": None, **trees}.items()
        }
        found.append((row, model, runs))
    runners = [*rivals, *(run for _, _, runs in found for run in runs.values())]
    for _ in interleave_with_bar(runners, [[each] for each in questions], 1, title, "question"):
        pass
    sampled = settings["temperature"] > 0
    rows = []
    for row, model, runs in found:
        own = {name: figures(Bench(model, run, rivals, questions, sampled, sampled)) for name, run in runs.items()}
        others = {f"{key}_{name}": value for name in trees for key, value in own[name].items()}
        rows.append(row | own["tree"] | others)
    return {
        "rows": rows, "questions": len(questions), **settings, "tree": limits(plain.tree),
        **{name: limits(tree) for name, tree in trees.items()},
        "baselines": {rival.name: rival.total.decoding_speed for rival in rivals},
    }  # fmt: skip


def figures(bench: Bench) -> dict[str, Any]:
    """The figures of one head with one tree."""
    total, found = bench.msd.total, bench.figures(range(len(bench.questions)))
    return {
        "tau": total.tau, "acceptance": total.acceptance_by_position,
        "draft_percent": 100 * total.shares()["cycle"]["draft"],
        "draft_ms": total.phases_ms["draft"] / total.cycles, "verify_ms": total.phases_ms["verify"] / total.cycles,
        "speedup": found["speedup"], "after_first_token": found["after_first_token"]["speedup"],
        "identical": found["identical"]["answers"], "answers": found["identical"]["of"],
    }  # fmt: skip


def limits(tree: TreeConfig) -> str:
    """Depth, top-k and nodes of a tree."""
    return f"{tree.depth}/{tree.top_k}/{tree.total_tokens}{' at most' if tree.adaptive else ''}"

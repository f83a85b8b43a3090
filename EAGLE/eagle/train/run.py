"""One training run: from the flags to a trained draft."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from eagle.attention import leave_out_cudnn_attention
from eagle.drafts.block import BlockDraft
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.config import BlockConfig, DraftConfig
from eagle.drafts.eagle3_config import Eagle3Config
from eagle.drafts.head import TrainedHead
from eagle.drafts.msd import DraftModel
from eagle.extras import require
from eagle.families.base_weights import BaseTensors, load_base_tensors
from eagle.ge_data.extract import fingerprint
from eagle.questions import Question, read_questions
from eagle.train.checkpoint import KIND, CheckpointStore, Progress, describe_run
from eagle.train.dataset import TrainingData, load_stored
from eagle.train.engine import Engine, PlainEngine, precision, read_deepspeed_config, suit_device, without_effect
from eagle.train.kinds import KINDS
from eagle.train.objective import Objective
from eagle.train.online import Processes, load_corpus
from eagle.train.schedule import IMAGE, TEXT, BatchSizes, Schedule
from eagle.train.served import ServedEvaluation
from eagle.train.settings import (
    TrainConfig,
    check_sources,
    override,
    read_config,
    with_draft_settings,
)
from eagle.train.tracking import FIRST_STEPS, Tracker
from eagle.train.trainer import Trainer
from llava.errors import UserError


def train(args: argparse.Namespace) -> None:
    """Trains as the flags of `eagle.train.main_deepspeed` say."""
    with ExitStack() as stack:
        run(args, stack)


def run(args: argparse.Namespace, stack: ExitStack) -> None:
    """Settings → base tensors → data → engine → resume → train. ``stack`` unlocks the checkpoint folder at the end."""
    require("matplotlib", extra="train")  # draws the plot at the end
    leave_out_cudnn_attention()
    draft_config, config = read_config(args.config, args.basepath, args.draft_kind, args.draft_positions)
    config = override(config, args)
    deepspeed_config = read_deepspeed_config(args.deepspeed_config)
    check_sources(args)
    questions = evaluation_questions(args, config)
    base = load_base_tensors(args.basepath)
    rank, world = join_processes()
    if args.online:
        data = load_online(args, draft_config, base, config, Processes(rank, world, own_device()))
    else:
        folders = {TEXT: args.tmpdir_t, IMAGE: args.tmpdir_v}
        layers = read_layers(draft_config, args.basepath)
        data = load_stored(folders, draft_config.hidden_size, base, config, layers)
    asked = precision(deepspeed_config)
    deepspeed_config = suit_device(deepspeed_config, main=rank == 0)
    sizes = BatchSizes.from_deepspeed(deepspeed_config, world, where=args.deepspeed_config)
    schedule = data.schedule(sizes, config)
    store = open_store(args, data, config, schedule.total_steps, main=rank == 0)
    stack.callback(store.close)
    objective = build_objective(args, draft_config, base, config, data, main=rank == 0)
    engine = build_engine(objective, config, deepspeed_config, sizes)
    store.check_shared(engine)
    progress = restore(args, store, engine, data, schedule, config, asked)
    if engine.is_main:
        print(schedule.describe(), flush=True)
        print(left_to_do(progress, schedule, config), flush=True)
    total = min(config.max_steps or schedule.total_steps, schedule.total_steps)
    served = None
    if questions:
        served = ServedEvaluation(
            args.basepath,
            questions,
            Path(args.cpdir),
            config.eval_length,
            engine.device,
            engine.is_main,
            args.self_check,
        )
    settings = {"base": args.basepath, "eval_data": args.eval_data and str(args.eval_data), **asdict(config)}
    tracker = Tracker(Path(args.cpdir), args.tracker, total, progress.step, settings, engine.is_main)
    trainer = Trainer(engine, data, schedule, config, store, tracker, progress, served)
    complete = trainer.run()
    tracker.finish(progress.history)
    if engine.is_main:
        stopped = f"stopped after step {progress.step} of {schedule.total_steps}"
        stopped += "; to continue, --resume with a larger --max-steps or without it; draft so far"
        print(f"{'trained' if complete else stopped}: {Path(args.cpdir) / 'final'}", flush=True)


def evaluation_questions(args: argparse.Namespace, config: TrainConfig) -> list[Question]:
    """The questions that are answered during training; none without --eval-data.

    Raises:
        UserError: they cannot be read, or there are settings for an evaluation without questions.
    """
    if args.eval_data is not None:
        return read_questions(args.eval_data, config.eval_limit)
    for name in ("eval_every", "eval_limit", "eval_length"):
        if getattr(config, name) != getattr(TrainConfig(), name):
            raise UserError(f"{name}={getattr(config, name)} without questions", "--eval-data", "name a question file")
    return []


def left_to_do(progress: Progress, schedule: Schedule, config: TrainConfig) -> str:
    """Which steps this run makes, in one line."""
    limit = min(config.max_steps or schedule.total_steps, schedule.total_steps)
    if progress.step >= limit:
        return f"nothing to train: step {progress.step} is done"
    time = f"; an estimate of the time follows after {FIRST_STEPS} steps" if limit - progress.step > FIRST_STEPS else ""
    return f"this run: steps {progress.step + 1} to {limit}{time}"


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_processes() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not launched():
        return 0, 1
    from eagle.train import engine_deepspeed

    return engine_deepspeed.join_processes()


def load_online(
    args: argparse.Namespace,
    draft_config: DraftConfig | Eagle3Config,
    base: BaseTensors,
    config: TrainConfig,
    processes: Processes,
) -> TrainingData:
    """Training without stored hidden states: loads the base model and splits the annotation files."""
    KINDS[type(draft_config)].objective.check(draft_config.for_vocabulary(base.embed.shape[0]), base, config)
    if not args.resume:
        CheckpointStore(args.cpdir, config.keep_last, {}).refuse_to_overwrite()
    files = {name: path for name, path in ((TEXT, args.annotations_t), (IMAGE, args.annotations_v)) if path is not None}
    return load_corpus(args, files, config, processes, draft_config.layers_of)


def read_layers(draft: DraftConfig | Eagle3Config, base: str) -> tuple[int, ...]:
    """The layers of the base whose input streams a draft reads. Only an EAGLE-3 head needs the base's config."""
    if isinstance(draft, DraftConfig):
        return ()
    from eagle.families.draft_config import text_config_of

    return draft.layers_of(text_config_of(base)[1].num_hidden_layers)


def own_device() -> torch.device:
    """The device that this process trains on."""
    if not launched():
        return PlainEngine.choose_device()
    from eagle.train import engine_deepspeed

    return engine_deepspeed.own_device()


def open_store(
    args: argparse.Namespace, data: TrainingData, config: TrainConfig, total_steps: int, main: bool
) -> CheckpointStore:
    sources = {name: samples.describe() for name, (samples, _, _) in data.sources.items()}
    provenance = {**describe_run(sources, asdict(config)), "total_steps": total_steps}
    store = CheckpointStore(args.cpdir, config.keep_last, provenance)
    if main:
        store.lock()
        store.recover()
    if not args.resume:
        try:
            store.refuse_to_overwrite()
        except UserError:
            store.close()
            raise
    return store


def build_objective(
    args: argparse.Namespace,
    draft_config: DraftConfig | Eagle3Config,
    base: BaseTensors,
    config: TrainConfig,
    data: TrainingData,
    main: bool,
) -> Objective[TrainedHead]:
    """The draft, new or from ``--init``, with the base's embedding and vocabulary."""
    kind = KINDS[type(draft_config)]
    vocab = base.embed.shape[0]
    if vocab != draft_config.vocab_size and main:
        print(f"vocabulary: {vocab} as in the base model (the config says {draft_config.vocab_size})", flush=True)
    torch.manual_seed(config.seed)
    if args.init:
        draft = load_draft(args.init, dtype=torch.float32)
        if isinstance(draft_config, BlockConfig) and type(draft) is DraftModel:
            draft = BlockDraft.begun_from(draft, draft_config.block)
        if type(draft) is not kind.head:
            raise UserError(f"--init is one of the {draft.kind} heads, --config one of {kind.head.kind}", args.init)
        wanted = with_draft_settings(draft_config.for_vocabulary(draft.config.vocab_size), config)
        draft.config = with_draft_settings(draft.config, config)
        check_init(draft.config, wanted, args.init)
        return kind.objective(draft.train(), base, config)
    draft = kind.head(with_draft_settings(draft_config.for_vocabulary(vocab), config))
    objective = kind.objective(draft.train(), base, config)
    objective.begin(data.answers())
    return objective


FROM_CHECKPOINT = (
    "model_type", "input_layernorm", "attention_bias", "output_bias", "fc_bias", "query_norm", "own_embedding",
    "options", "head_tokens", "compressor_bias",
)  # fmt: skip
"""Fields that follow a draft's tensors and files; options are compared one by one."""


def check_init(own: Any, wanted: Any, name: str) -> None:
    """Raises `UserError` for the first difference in shape or ``"msd"`` section between ``--init`` and ``--config``."""
    parts = [("", own, wanted)]
    if isinstance(own, DraftConfig):
        parts.append(("msd.", own.options, wanted.options))
    for prefix, theirs, ours in parts:
        for key in fields(theirs):
            given, asked = getattr(theirs, key.name), getattr(ours, key.name)
            if key.compare and key.name not in FROM_CHECKPOINT and given != asked:
                raise UserError(
                    f"--init has {prefix}{key.name}={given}, --config {asked}", name, "take the draft's own config.json"
                )


def build_engine(
    objective: Objective[TrainedHead], config: TrainConfig, deepspeed_config: dict[str, Any], sizes: BatchSizes
) -> Engine:
    if not launched():
        if (line := without_effect(deepspeed_config)) is not None:
            print(line, flush=True)
        return PlainEngine(objective, config, deepspeed_config, sizes)
    from eagle.train.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(objective, config, deepspeed_config, sizes)


def restore(
    args: argparse.Namespace,
    store: CheckpointStore,
    engine: Engine,
    data: TrainingData,
    schedule: Schedule,
    config: TrainConfig,
    asked: Mapping[str, Any],
) -> Progress:
    """Progress of the interrupted run with ``--resume``, else a new one. ``asked``: by `precision`."""
    draft = engine.objective.draft
    sizes = {**asdict(schedule.sizes), "text": schedule.text, "image": schedule.image}
    init = fingerprint(draft.fc.weight) if args.init else "none"
    chosen = {**draft.config.training_choices(), **config.fingerprint()}
    run = {KIND: draft.kind, **sizes, **chosen, **data.run, **asked, "init": init}
    folder = store.latest() if args.resume else None
    if folder is None:
        if args.resume and engine.is_main:
            print(f"no checkpoint in {args.cpdir} yet: starting a new run", flush=True)
        return Progress(run=run)
    progress = store.load(engine, folder, run, schedule.steps_per_epoch)
    if engine.is_main:
        print(f"resumed after step {progress.step} from {folder}", flush=True)
    return progress

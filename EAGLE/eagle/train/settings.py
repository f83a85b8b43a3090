"""Settings of a training run: the strict ``"train"`` section of the draft's config, and all flags of the command.

The file given by ``--config`` is the draft's published ``config.json`` plus this section, which is not written to a
checkpoint. `TrainConfig` is the one list of settings: file keys, flags and ``--help`` all come from it.
Micro-batch, accumulation, clipping and precision are DeepSpeed's settings, in its own config. Does not import torch.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import Field
from pydantic.fields import FieldInfo

from eagle.arguments import DTYPES, NO_SELF_CHECK, positive
from eagle.drafts.config import BLOCK, VISPEC, BlockConfig, DraftConfig, ViSpecConfig
from eagle.drafts.eagle3_config import Eagle3Config, is_eagle3_config
from eagle.families import TRAINING_NAMES
from llava.errors import UserError
from llava.files import read_json
from llava.strict import read_strict, strict_dataclass

SECTION = "train"
SECTIONS = (SECTION, "msd", BLOCK, VISPEC)
AUTO = "auto"
DRAFT_KINDS = ("msd", "eagle3", "block", "vispec")
DRAFT_POSITIONS = ("plain", "temporal", "mrope")
EAGLE3_RECIPE: dict[str, Any] = {"rollout_steps": 7, "hidden_weight": 0.0, "token_weight": 1.0, "noise": 0.0}
"""Defaults of a run that trains an EAGLE-3 head (arXiv 2503.01840), where they differ."""
VISPEC_RECIPE: dict[str, Any] = {"rollout_steps": 2, "rollout_decay": 1.0, "image_start": 1.0}
"""Defaults of a run that trains a ViSpec head (arXiv 2509.15235), where they differ."""
AnyDraft = TypeVar("AnyDraft", bound=DraftConfig | Eagle3Config)
TRACKERS = ("tensorboard", "wandb", "none")
IMAGE_FOLDER = Path("image_data")


@strict_dataclass
class TrainConfig:
    """Defaults are the published recipe (arXiv 2505.14260); the last two groups are ours."""

    epochs: int = Field(40, ge=1, description="passes over min(text, image) samples")
    text_share: float = Field(
        0.5, ge=0, le=1, description="share of the epochs with text alone, before image samples come in"
    )
    image_start: float = Field(
        0.0, ge=0, le=1, description="share of image samples that the rise starts from when they come in"
    )
    image_end: float = Field(1.0, ge=0, le=1, description="share of image samples in the last epoch")
    max_length: int = Field(2048, ge=3, description="positions of a sample, image tokens included; the rest is cut")
    draft_image_tokens: int = Field(
        -1,
        ge=-1,
        description="image rows that the draft keeps of a picture, merged; -1: as section 'msd' says, else all",
    )
    validation_share: float = Field(0.05, ge=0, le=0.9, description="share of each data set kept for validation")
    seed: int = Field(42, ge=0, le=2**63 - 1, description="seed of split, order, noise and initial weights")

    learning_rate: float = Field(5e-5, ge=0, description="peak learning rate of AdamW")
    beta1: float = Field(0.9, ge=0, le=1, description="AdamW's beta1")
    beta2: float = Field(0.95, ge=0, le=1, description="AdamW's beta2")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    warmup_share: float = Field(
        0.0025, ge=0, le=1, description="share of all steps in which the rate rises; it falls linearly after"
    )

    hidden_weight: float = Field(1.0, ge=0, description="weight of SmoothL1 on the hidden states")
    token_weight: float = Field(0.1, ge=0, description="weight of the cross-entropy against the target's distribution")
    noise: float = Field(0.2, ge=0, description="noise on the input hidden states: uniform, times 512 / length")
    rollout_steps: int = Field(1, ge=1, le=16, description="steps trained on the draft's own outputs; 1 is the recipe")
    rollout_decay: float = Field(
        0.8, ge=0, le=1, description="weight of each further rollout step relative to the one before"
    )
    head_chunk: int = Field(512, ge=1, description="rows that go through lm_head at a time")

    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0 is once an epoch")
    save_minutes: float = Field(
        0.0, ge=0, description="minutes between checkpoints, in place of save_every; 0 is by steps"
    )
    validate_every: int = Field(0, ge=0, description="steps between validations; 0 is once an epoch")
    log_every: int = Field(10, ge=1, description="steps between logged values")
    keep_last: int = Field(2, ge=1, description="checkpoints kept, the newest ones (the best is kept apart)")
    max_steps: int = Field(
        0, ge=0, description="stop after so many steps and save, to resume with --resume; 0 is no limit"
    )
    simulated_depth: int = Field(6, ge=1, le=16, description="tokens drafted in validation's simulated decoding")
    validation_limit: int = Field(256, ge=1, description="samples of each data set that a validation uses at most")
    eval_every: int = Field(0, ge=0, description="steps between evaluations on --eval-data; 0 is once an epoch")
    eval_limit: int = Field(8, ge=1, description="questions of --eval-data that are asked, the first ones")
    eval_length: int = Field(128, ge=1, description="new tokens of an answer in an evaluation at most")
    workers: int = Field(0, ge=0, description="threads that load samples; 0 is 4 for a GPU and 1 for a CPU")

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the loss curve; a resumed run must have the same."""
        free = {"save_every", "save_minutes", "validate_every", "log_every", "keep_last", "max_steps", "workers",
                "head_chunk", "simulated_depth", "validation_limit", "eval_every", "eval_limit",
                "eval_length"}  # fmt: skip
        late = {"draft_image_tokens"} if self.draft_image_tokens < 0 else set()  # older runs do not have it
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free | late}


def with_draft_settings(draft: AnyDraft, config: TrainConfig) -> AnyDraft:
    """The draft's config with the training settings that decoding needs too."""
    if config.draft_image_tokens < 0:
        return draft
    if isinstance(draft, Eagle3Config):
        return cast(AnyDraft, replace(draft, image_tokens=config.draft_image_tokens))
    options = replace(draft.options, image_tokens=config.draft_image_tokens)
    return cast(AnyDraft, replace(draft, options=options))


def find_config(path: str | Path) -> Path:
    """``path``; a bare file name that does not exist means the shipped config of that name."""
    path, shipped = Path(path), Path(__file__).parent / Path(path).name
    return shipped if not path.exists() and path.parent == Path() and shipped.is_file() else path


def read_config(
    path: str | Path, base: str | None = None, kind: str | None = None, positions: str | None = None
) -> tuple[DraftConfig | Eagle3Config, TrainConfig]:
    """Reads a training config: the draft's ``config.json`` with a ``"train"`` section (absent: the recipe).

    Args:
        path: the file, or "auto" for a draft with the sizes of the base model.
        base: the base model.
        kind: one of `DRAFT_KINDS`, of a draft by "auto"; None: "msd".
        positions: one of `DRAFT_POSITIONS`, of a draft by "auto"; None: the kind's own choice.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; an unknown key names the nearest known one.
    """
    if str(path) == AUTO and base is not None:
        from eagle.families.draft_config import draft_config_of, eagle3_config_of, vispec_config_of  # imports torch

        makers: dict[str | None, Any] = {"eagle3": eagle3_config_of, "vispec": vispec_config_of}
        if kind == "vispec" and positions is not None:
            fix = "leave it out: its positions are plain"
            raise UserError(f"--draft-positions {positions} for a ViSpec head", fix=fix)
        made: DraftConfig | Eagle3Config = makers.get(kind, draft_config_of)(base)
        options = {} if positions is None else {"msd": {"positions": positions}}
        kind_of_draft = BlockConfig if kind == "block" else type(made)
        made = kind_of_draft.from_dict({**made.published, **options}, where=f"draft for {base}")
        return made, TrainConfig(**recipe_of(made))
    for flag, value in {"--draft-kind": kind, "--draft-positions": positions}.items():
        if value is not None:
            raise UserError(f"{flag} {value} with a config file", path, f"leave it out, or give --config {AUTO}")
    path = find_config(path)
    content = read_json(path, "training config")
    if not isinstance(content, dict) or not isinstance(content.get(SECTION, {}), dict):
        raise UserError("training config is not a JSON object with a 'train' object", where=path)
    reject_misplaced(content, path)
    draft = {key: value for key, value in content.items() if key != SECTION}
    eagle3 = is_eagle3_config(draft)
    if eagle3 + (BLOCK in draft) + (VISPEC in draft) > 1:
        fix = f"leave out all but one of the keys of an EAGLE-3 head and the sections '{BLOCK}' and '{VISPEC}'"
        raise UserError("a config of two kinds of heads", path, fix)
    with_section = BlockConfig if BLOCK in draft else ViSpecConfig if VISPEC in draft else DraftConfig
    kind_of_config = Eagle3Config if eagle3 else with_section
    read = kind_of_config.from_dict(draft, where=path)
    one_layer = kind_of_config in (DraftConfig, ViSpecConfig)
    if one_layer and (layers := draft.get("num_hidden_layers")) not in (None, 1):
        raise UserError(
            f"num_hidden_layers={layers!r}", path, "give 1: an MSD draft has one layer, and a ViSpec head too"
        )
    section = {**recipe_of(read), **content.get(SECTION, {})}
    return read, read_strict(TrainConfig, section, f"{path}, section '{SECTION}'")


def recipe_of(draft: DraftConfig | Eagle3Config) -> dict[str, Any]:
    """The defaults of a kind of drafts, where they differ."""
    if isinstance(draft, Eagle3Config):
        return EAGLE3_RECIPE
    if isinstance(draft, ViSpecConfig):
        return VISPEC_RECIPE
    if not isinstance(draft, BlockConfig):
        return {}
    size = draft.block.size
    depth = min(size, TrainConfig().simulated_depth)
    return {**EAGLE3_RECIPE, "rollout_steps": size, "simulated_depth": depth}


def reject_misplaced(content: Mapping[str, Any], where: str | Path) -> None:
    """Raises `UserError` for a setting outside of section ``"train"``, and for a misspelt name of a section.

    Other keys belong to the published ``config.json``, and every base model has its own. ``max_length`` is one of them:
    transformers used to write it there.
    """
    for key in content:
        if key in {f.name for f in fields(TrainConfig)} - {"max_length"}:
            raise UserError(f"'{key}' is outside of section '{SECTION}'", where=where, fix="move it into the section")
        near = difflib.get_close_matches(key.lower(), SECTIONS, n=1, cutoff=0.75)
        if near and key not in SECTIONS:
            raise UserError(f"unknown key '{key}'", where=where, fix=f"did you mean '{near[0]}'?")


def settings() -> dict[str, FieldInfo]:
    """Type, default, bounds and description of each setting."""
    return cast(Any, TrainConfig).__pydantic_fields__


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; a flag wins over the config."""
    group = parser.add_argument_group("training settings", "win over the 'train' section of --config")
    for name, info in settings().items():
        whole = info.annotation is int
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=int if whole else float,
            metavar="N" if whole else "X",
            help=f"{info.description} (default {info.default})",
        )


def override(config: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    """``config`` with the flags that were given.

    Raises:
        UserError: a value is out of bounds, or checkpoints are asked for both by steps and by time.
    """
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    config = replace(config, **given)
    if config.save_every and config.save_minutes:
        raise UserError(
            f"save_every={config.save_every} and save_minutes={config.save_minutes:g}", fix="give one of them"
        )
    return config


def check_settings(args: argparse.Namespace) -> None:
    """Checks all flags and the training config, without the base model and the data.

    Raises:
        UserError: one of them is wrong.
    """
    of_draft = (args.draft_kind, args.draft_positions)
    config = TrainConfig() if args.config == AUTO else read_config(args.config, None, *of_draft)[1]
    override(config, args)
    check_sources(args)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where samples come from: stored hidden states, or annotation files and the base model."""
    stored = parser.add_argument_group("stored hidden states (eagle.ge_data.allocation), of one set or both")
    stored.add_argument("--tmpdir_t", metavar="DT", help="those of the text set")
    stored.add_argument("--tmpdir_v", metavar="DV", help="those of the image set")
    add = parser.add_argument_group("without stored hidden states, with one annotation file or both").add_argument
    add("--online", action="store_true", help="run the base model beside the draft")
    add(
        "--annotations_t",
        type=Path,
        metavar="FILE",
        help="annotation file of the text set: its records without picture",
    )
    add("--annotations_v", type=Path, metavar="FILE", help="annotation file of the image set: its records with one")
    add("--image-folder", type=Path, metavar="DIR", help=f"folder of the pictures (default {IMAGE_FOLDER})")
    add("--limit", type=positive, metavar="N", help="at most N records of each file, in shuffled order")
    add("--model_type", choices=TRAINING_NAMES, help="the family that the base model must be of (default: any)")
    add("--dtype", choices=DTYPES, help="dtype of the base model (default auto, the checkpoint's)")
    add("--batch-tokens", type=positive, metavar="N", help="most tokens of its forward (default 8192, on a CPU 1024)")
    add("--no-self-check", **NO_SELF_CHECK)


def check_sources(args: argparse.Namespace) -> None:
    """Sets the defaults of the flags that belong to --online.

    Raises:
        UserError: no data, or flags of both ways together.
    """
    stored = {"--tmpdir_t": args.tmpdir_t, "--tmpdir_v": args.tmpdir_v}
    files = {"--annotations_t": args.annotations_t, "--annotations_v": args.annotations_v}
    others = {"--image-folder": args.image_folder, "--limit": args.limit, "--model_type": args.model_type}
    others.update({"--dtype": args.dtype, "--batch-tokens": args.batch_tokens})
    others["--no-self-check"] = None if args.self_check or args.eval_data else False
    wanted = files if args.online else stored
    fix = f"give {' or '.join(wanted)}, or both"
    for flag, value in (stored if args.online else {**files, **others}).items():
        if value is not None:
            raise UserError(f"{flag} is for training {'without' if args.online else 'with'} --online", fix=fix)
    if all(value is None for value in wanted.values()):
        raise UserError("no data", fix=fix)
    args.image_folder = args.image_folder or IMAGE_FOLDER
    args.dtype = args.dtype or "auto"

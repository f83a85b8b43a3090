"""Settings of a training run: the strict ``"train"`` section of the draft's config, and flags of the same names.

The file given by ``--config`` is the draft's published ``config.json`` plus this section, which never reaches a
checkpoint. `TrainConfig` is the one list of settings: file keys, flags and ``--help`` all come from it.
Micro-batch, accumulation, clipping and precision are DeepSpeed's and live in its config.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from eagle.drafts.config import DraftConfig
from llava.errors import UserError
from llava.files import read_json
from llava.strict import reject_unknown

SECTION = "train"
SECTIONS = (SECTION, "msd")


def setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A field of `TrainConfig`: its default, its line of ``--help`` and its bounds."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are the published recipe (arXiv 2505.14260); the last two groups are ours."""

    epochs: int = setting(40, "passes over min(text, image) samples", 1)
    text_share: float = setting(0.5, "share of the epochs with text alone, before image samples come in", 0, 1)
    image_start: float = setting(0.0, "share of image samples that the rise starts from when they come in", 0, 1)
    image_end: float = setting(1.0, "share of image samples in the last epoch", 0, 1)
    max_length: int = setting(2048, "positions of a sample, image tokens included; the rest is cut", 3)
    draft_image_tokens: int = setting(
        -1, "image rows that the draft keeps of a picture, merged; -1: as section 'msd' says, else all", -1
    )
    validation_share: float = setting(0.05, "share of each data set kept for validation", 0, 0.9)
    seed: int = setting(42, "seed of split, order, noise and initial weights", 0)

    learning_rate: float = setting(5e-5, "peak learning rate of AdamW", 0)
    beta1: float = setting(0.9, "AdamW's beta1", 0, 1)
    beta2: float = setting(0.95, "AdamW's beta2", 0, 1)
    weight_decay: float = setting(0.0, "AdamW's weight decay", 0)
    warmup_share: float = setting(0.0025, "share of all steps in which the rate rises; it falls linearly after", 0, 1)

    hidden_weight: float = setting(1.0, "weight of SmoothL1 on the hidden states", 0)
    token_weight: float = setting(0.1, "weight of the cross-entropy against the target's distribution", 0)
    noise: float = setting(0.2, "noise on the input hidden states: uniform, times 512 / length", 0)
    rollout_steps: int = setting(1, "steps trained on the draft's own outputs; 1 is the recipe", 1, 16)
    rollout_decay: float = setting(0.8, "weight of each further rollout step relative to the one before", 0, 1)
    head_chunk: int = setting(512, "rows that go through lm_head at a time", 1)

    save_every: int = setting(0, "steps between checkpoints; 0 is once an epoch", 0)
    validate_every: int = setting(0, "steps between validations; 0 is once an epoch", 0)
    log_every: int = setting(10, "steps between logged values", 1)
    keep_last: int = setting(2, "checkpoints kept, the newest ones (the best is kept apart)", 1)
    max_steps: int = setting(0, "stop after so many steps and save, to go on with --resume; 0 is no limit", 0)
    simulated_depth: int = setting(6, "tokens drafted in validation's simulated decoding", 1, 16)
    validation_limit: int = setting(256, "samples of each data set that a validation uses at most", 1)
    workers: int = setting(0, "processes that load samples, 0 for a thread", 0)

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_setting(f.name, getattr(self, f.name), f.type, f.metadata)

    @classmethod
    def from_dict(cls, section: Mapping[str, Any], where: str | Path) -> TrainConfig:
        """Raises `UserError` for an unknown key (naming the nearest known one) or a bad value."""
        reject_unknown(section, [f.name for f in fields(cls)], f"{where}, section '{SECTION}'")
        return cls(**section)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the loss curve; a resumed run must have the same."""
        free = {"save_every", "validate_every", "log_every", "keep_last", "max_steps", "workers", "head_chunk",
                "simulated_depth", "validation_limit"}  # fmt: skip
        late = {"draft_image_tokens"} if self.draft_image_tokens < 0 else set()  # runs from before it can go on
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free | late}


def _check_setting(name: str, value: Any, kind: Any, bounds: Mapping[str, Any]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or (kind == "int" and not isinstance(value, int)):
        raise UserError(f"training setting {name}={value!r}", fix=f"give {'a whole' if kind == 'int' else 'a'} number")
    low, high = bounds["low"], bounds["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"training setting {name}={value}", fix=f"give a number {span}")


def with_draft_settings(draft: DraftConfig, config: TrainConfig) -> DraftConfig:
    """The draft's config with those of the settings that decoding needs too."""
    if config.draft_image_tokens < 0:
        return draft
    return replace(draft, options=replace(draft.options, image_tokens=config.draft_image_tokens))


def find_config(path: str | Path) -> Path:
    """``path``, or the shipped config of that bare name where there is no such file here."""
    path, shipped = Path(path), Path(__file__).parent / Path(path).name
    return shipped if not path.exists() and path.parent == Path() and shipped.is_file() else path


def read_config(path: str | Path) -> tuple[DraftConfig, TrainConfig]:
    """Reads a training config: the draft's ``config.json`` with a ``"train"`` section (absent: the recipe).

    A bare file name that is not here means the one shipped in this folder.
    """
    path = find_config(path)
    content = read_json(path, "training config")
    if not isinstance(content, dict) or not isinstance(content.get(SECTION, {}), dict):
        raise UserError("training config is no JSON object with a 'train' object", where=path)
    reject_misplaced(content, path)
    draft = {key: value for key, value in content.items() if key != SECTION}
    return DraftConfig.from_dict(draft, where=path), TrainConfig.from_dict(content.get(SECTION, {}), where=path)


def reject_misplaced(content: Mapping[str, Any], where: str | Path) -> None:
    """Raises `UserError` for a setting beside the ``"train"`` section, and for a misspelt name of a section.

    Other keys are those of a published ``config.json``, of which every base model has its own. ``max_length`` is among
    them: transformers used to write it there.
    """
    for key in content:
        if key in {f.name for f in fields(TrainConfig)} - {"max_length"}:
            raise UserError(f"'{key}' stands beside section '{SECTION}'", where=where, fix="move it into the section")
        near = difflib.get_close_matches(key.lower(), SECTIONS, n=1, cutoff=0.75)
        if near and key not in SECTIONS:
            raise UserError(f"unknown key '{key}'", where=where, fix=f"did you mean '{near[0]}'?")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; a flag wins over the config."""
    group = parser.add_argument_group("training settings", "win over the 'train' section of --config")
    for f in fields(TrainConfig):
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            type=int if f.type == "int" else float,
            metavar="N" if f.type == "int" else "X",
            help=f"{f.metadata['help']} (default {f.default})",
        )


def override(config: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    """``config`` with the flags that were given."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    return replace(config, **given)

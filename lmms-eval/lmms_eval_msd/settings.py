"""Settings as lmms-eval gives them: `--model_args` of a model, and `generation_kwargs` of a task."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loguru import logger
from transformers import GenerationConfig

from eagle import TreeConfig
from eagle.decode.sampling import SamplingSettings
from llava.arguments import positive
from llava.errors import UserError
from llava.hub import HUB_KEYS
from llava.strict import reject_unknown

OWN = (
    "pretrained", "use_msd", "msd_model_path", "msd_baseline", "msd_baseline_requests", "dtype", "device",
    "device_map", "batch_size", "system_prompt",
)  # fmt: skip
TREE = {"msd_depth": "depth", "msd_top_k": "top_k", "msd_total_tokens": "total_tokens"}
LOADING = (
    "attn_implementation", "revision", "draft_revision", "cache_dir", "local_files_only", "token", "draft_image_tokens",
    "compile", "self_check",
)  # fmt: skip
DEFAULT_MAX_NEW_TOKENS = 1024
NOT_OURS = {"image_sizes", "image_aspect_ratio", "max_agentic_steps", "modalities", "use_cache"}
_reported: set[str] = set()


@dataclass(frozen=True)
class ModelArgs:
    """Arguments of a model other than those that its class names.

    ``tree``: bounds of the draft tree, None for the default; ``loading``: for `MSDModel.from_pretrained`; ``prompts``:
    for the family's prompts.
    """

    tree: TreeConfig | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any], prompts: Sequence[str], model: str) -> ModelArgs:
        """Sorts the arguments.

        Args:
            given: of `--model_args`.
            prompts: names of the arguments that the family's prompts have.
            model: `--model`, for messages.

        Raises:
            UserError: the model has no such argument.
        """
        known = (*OWN, *TREE, *LOADING, *prompts)
        reject_unknown(given, known, f"--model_args of {model}")
        bounds = {name: given[key] for key, name in TREE.items() if key in given}
        return cls(
            TreeConfig(**bounds) if bounds else None,
            {key: as_bool(key, given[key]) if key == "self_check" else given[key] for key in LOADING if key in given},
            {key: PROMPTS[key](key, given[key]) for key in prompts if key in given},
        )

    @property
    def hub(self) -> dict[str, Any]:
        """Hub settings of the base model."""
        return {key: value for key, value in self.loading.items() if key in HUB_KEYS}


def as_bool(name: str, value: Any) -> bool:
    """A switch from `--model_args`, where lmms-eval leaves anything but True and False as text; else a `UserError`."""
    if isinstance(value, bool):
        return value
    texts = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str(value).lower() not in texts:
        raise UserError(f"{name} is neither True nor False", where=str(value))
    return texts[str(value).lower()]


def as_count(name: str, value: Any) -> int:
    """A whole number of at least 1, else a `UserError`."""
    try:
        return positive(str(value))
    except ArgumentTypeError as error:
        raise UserError(f"{name}: {error}", fix="give a whole number of at least 1") from None


def as_batch_size(value: int | str) -> int:
    """A batch size; lmms-eval's `auto` is one."""
    return 1 if str(value).startswith("auto") else as_count("batch_size", value)


def as_text(_: str, value: Any) -> str:
    return str(value)


PROMPTS: dict[str, Callable[[str, Any], Any]] = {
    "chat_template": as_text,
    "image_aspect": as_text,
    "min_pixels": as_count,
    "max_pixels": as_count,
    "total_pixels": as_count,
    "max_patches": as_count,
    "max_soft_tokens": as_count,
    "max_num_frames": as_count,
    "interleave_visuals": as_bool,
    "reasoning_prompt": as_text,
    "enable_thinking": as_bool,
}
"""How arguments of prompts are read."""


@dataclass(frozen=True)
class GenerationSettings:
    """``until``: texts that end the answer. ``engine``: keyword arguments of `MSDModel.generate`."""

    until: tuple[str, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_task(
        cls,
        given: Mapping[str, Any] | None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        ignored_stops: Collection[str] = (),
    ) -> GenerationSettings:
        """Reads `generation_kwargs`, with `--gen_kwargs` merged in by lmms-eval.

        A temperature decides between greedy search and sampling, as in lmms-eval's own models, because
        `--gen_kwargs temperature=1` leaves a task's `do_sample: false` in place. Without a temperature `do_sample`
        decides; lmms-eval's own models ignore it then and are greedy.

        Args:
            given: the task's settings; they are not changed.
            max_new_tokens: if the task has no limit.
            ignored_stops: texts in `until` that do not end an answer.

        Raises:
            UserError: a setting has a value that cannot be used.
        """
        settings = {key: value for key, value in (given or {}).items() if value is not None}
        until = tuple(text for text in _as_texts(settings.pop("until", ())) if text not in ignored_stops)
        limit = settings.pop("max_gen_toks", None)
        engine: dict[str, Any] = {"max_new_tokens": settings.pop("max_new_tokens", limit) or max_new_tokens}
        temperature = _number("temperature", settings.pop("temperature", None))
        limits = {key: _number(key, settings.pop(key, None)) for key in ("top_p", "top_k")}
        do_sample = bool(settings.pop("do_sample", False))
        sampling = SamplingSettings(temperature or 0.0, limits["top_p"], limits["top_k"])
        engine["do_sample"] = do_sample if temperature is None else not sampling.greedy
        if engine["do_sample"]:
            engine["temperature"] = temperature
            engine |= {key: value for key, value in sampling.limits.items() if limits[key] is not None}
        known = GenerationConfig().to_dict().keys()
        for key, value in settings.items():
            if key in known and key not in NOT_OURS:
                engine[key] = value
            else:
                _ignore(key)
        return cls(until, engine)

    @property
    def key(self) -> Hashable:
        """Equal for settings that one batch can have."""
        return self.until, json.dumps(self.engine, sort_keys=True, default=repr)

    def cut(self, text: str) -> str:
        """The answer up to the first of the ``until`` texts."""
        ends = [text.find(stop) for stop in self.until if stop in text]
        return text[: min(ends)] if ends else text


def _as_texts(until: Any) -> tuple[str, ...]:
    texts = [until] if isinstance(until, str) else until
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError("generation setting 'until' is neither a text nor a list of texts", repr(until))
    return tuple(text for text in texts if text)


def _number(key: str, value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise UserError(f"generation setting '{key}' is not a number", repr(value)) from None


def _ignore(key: str) -> None:
    if key not in _reported and key not in NOT_OURS:
        logger.warning(f"generation setting '{key}' is not one of transformers' and is ignored")
    _reported.add(key)

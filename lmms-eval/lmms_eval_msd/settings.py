"""From a task's `generation_kwargs` to the engine's settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loguru import logger
from transformers import GenerationConfig

from llava.errors import UserError

DEFAULT_MAX_NEW_TOKENS = 1024  # of the class; each family has its own
NOT_OURS = {"image_sizes", "image_aspect_ratio", "max_agentic_steps", "modalities", "use_cache"}
_reported: set[str] = set()


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

        Where the temperature is given it decides between greedy search and sampling, as in lmms-eval's own models,
        because `--gen_kwargs temperature=1` leaves a task's `do_sample: false` behind. Else `do_sample` decides, of
        which lmms-eval's own models take no notice: without a temperature they are greedy.

        Args:
            given: the task's settings; they stay as they are.
            max_new_tokens: where the task has no limit.
            ignored_stops: texts in `until` that do not end an answer.

        Raises:
            UserError: a setting has a value that cannot be used.
        """
        settings = {key: value for key, value in (given or {}).items() if value is not None}
        until = tuple(text for text in _as_texts(settings.pop("until", ())) if text not in ignored_stops)
        limit = settings.pop("max_gen_toks", None)
        engine: dict[str, Any] = {"max_new_tokens": settings.pop("max_new_tokens", limit) or max_new_tokens}
        temperature = _number("temperature", settings.pop("temperature", None))
        do_sample = bool(settings.pop("do_sample", False)) if temperature is None else temperature > 0
        engine["do_sample"] = do_sample
        if do_sample:
            engine["temperature"] = temperature
        settings.pop("do_sample", None)
        for key in ("top_p", "top_k"):
            value = _number(key, settings.pop(key, None))
            if do_sample and value is not None:  # 0 means "off" in tasks
                engine[key] = int(value) if key == "top_k" else value or 1.0
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

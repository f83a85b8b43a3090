"""Interleaved comparison of ways to decode the same questions.

Every contestant answers question 1, then every contestant question 2, and so on, so that a slow minute of the machine
slows all of them. Speed is a ratio within one run.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from eagle.commands.questions import Question
from eagle.model.config import TreeConfig
from eagle.model.msd import MSDModel
from eagle.model.stats import Stats

PACKAGES = ("msd-eagle", "torch", "transformers", "accelerate")


@dataclass
class Contestant:
    """One way to decode. ``answer`` takes a question (or a batch) and returns its statistics; ``rounds`` has them."""

    name: str
    answer: Callable[[Any], Stats]
    rounds: list[Stats] = field(default_factory=list)

    @property
    def total(self) -> Stats:
        """All rounds together."""
        total = Stats.empty()
        for stats in self.rounds:
            total.merge(stats)
        return total

    @property
    def spread(self) -> float:
        """Interquartile range of tokens per second over questions, relative to the median."""
        speeds = [stats.tokens_per_second for stats in self.rounds]
        if len(speeds) < 4:
            return 0.0
        low, middle, high = statistics.quantiles(speeds, n=4)
        return (high - low) / middle


def with_engine(
    model: MSDModel, use_msd: bool, settings: Mapping[str, Any], tree: TreeConfig | None = None
) -> Callable[[Question], Stats]:
    """Decodes with our loop, with or without the draft."""

    def answer(question: Question) -> Stats:
        inputs = question.inputs(model.target)
        return model.generate(**inputs, use_msd=use_msd, tree=tree, **settings).stats

    return answer


def with_transformers(model: MSDModel, settings: Mapping[str, Any], **more: Any) -> Callable[[Question], Stats]:
    """Decodes with transformers' own `generate`; ``more`` are settings of it alone."""
    given = {key: value for key, value in settings.items() if key not in ("temperature", "seed")} | more
    if settings.get("temperature"):
        given.update(do_sample=True, temperature=settings["temperature"])
    else:
        given.update(do_sample=False)

    def answer(question: Question) -> Stats:
        inputs = question.inputs(model.target)
        start = time.perf_counter()
        sequences = model.target.model.generate(**inputs, **given)
        seconds = time.perf_counter() - start
        return Stats(new_tokens=sequences.shape[1] - inputs["input_ids"].shape[1], seconds=seconds)

    return answer


def with_prompt_lookup(model: MSDModel, settings: Mapping[str, Any], tokens: int) -> Callable[[Question], Stats]:
    """Decodes with transformers' speculation without a draft, which guesses ``tokens`` tokens from the text before.

    It would guess the ids that stand for pictures too, and then fail for want of their pixels; so they are suppressed.
    """
    config = model.target.config
    names = ("image_token_id", "video_token_id")
    pictures = [number for name in names if (number := getattr(config, name, None)) is not None]
    return with_transformers(model, settings, prompt_lookup_num_tokens=tokens, suppress_tokens=pictures)


def baselines(models: Sequence[MSDModel], settings: Mapping[str, Any]) -> list[Contestant]:
    """The plain ways to decode, for the same base model in each dtype."""
    found = []
    for model in models:
        dtype = str(model.dtype).removeprefix("torch.")
        found.append(Contestant(f"autoregressive {dtype}", with_engine(model, False, settings)))
        found.append(Contestant(f"transformers generate {dtype}", with_transformers(model, settings)))
    return found


def interleave(contestants: Sequence[Contestant], questions: Sequence[Any], warm_up: int) -> Iterator[int]:
    """Runs every contestant on every question; yields after each question.

    ``warm_up`` questions are answered first by everyone, and not counted.
    """
    for question in questions[:warm_up]:
        for contestant in contestants:
            contestant.answer(question)
    for number, question in enumerate(questions):
        shift = number % len(contestants)  # nobody is always first
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            contestant.rounds.append(contestant.answer(question))
        yield number


def strongest(contestants: Sequence[Contestant]) -> Contestant:
    """The fastest of them in tokens per second."""
    return max(contestants, key=lambda contestant: contestant.total.tokens_per_second)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found

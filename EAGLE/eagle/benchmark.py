"""Interleaved comparison of ways to decode the same questions.

Every contestant answers question 1, then every contestant question 2, and so on, so that a slow minute of the machine
slows all of them. Speed is a ratio within one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria

from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.decode.tree_config import TreeConfig
from eagle.families import Target


class Work(Protocol):
    """What a contestant answers: a question or a batch of them."""

    def inputs(self, target: Target) -> dict[str, Any]:
        """Model inputs, [B, S]."""


class Answer(NamedTuple):
    """Statistics, and the new ``tokens`` of each sequence up to its end token."""

    stats: Stats
    tokens: list[list[int]]


@dataclass
class Contestant:
    """One way to decode. ``answer`` answers a question (or a batch); ``rounds`` has what each of them took."""

    name: str
    answer: Callable[[Any], Answer]
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


class FirstToken(StoppingCriteria):
    """Stops nothing; knows when transformers' `generate` had its first new tokens."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.at is None:
            if input_ids.device.type != "cpu":
                torch.accelerator.synchronize()
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def new_tokens(sequences: Tensor, prompt: int, ends: Sequence[int]) -> list[list[int]]:
    """The new tokens of each of ``sequences`` [B, P + n] after ``prompt`` = P ids, up to its end token, without what
    fills it up."""
    rows = []
    for row in sequences[:, prompt:].tolist():
        stop = next((place for place, token in enumerate(row, start=1) if token in ends), len(row))
        rows.append(row[:stop])
    return rows


def with_engine(
    model: MSDModel, use_msd: bool, settings: Mapping[str, Any], tree: TreeConfig | None = None
) -> Callable[[Work], Answer]:
    """Decodes with our loop, with or without the draft."""

    def answer(work: Work) -> Answer:
        inputs = work.inputs(model.target)
        output = model.generate(**inputs, use_msd=use_msd, tree=tree, **settings)
        return Answer(output.stats, output.tokens)

    return answer


def with_transformers(model: MSDModel, settings: Mapping[str, Any], **more: Any) -> Callable[[Work], Answer]:
    """Decodes with transformers' own `generate`; ``more`` are settings of it alone. A seed is that of torch's global
    random state, which sampling there draws from."""
    given = {key: value for key, value in settings.items() if key not in ("temperature", "seed")} | more
    if settings.get("temperature"):
        given.update(do_sample=True, temperature=settings["temperature"])
    else:
        given.update(do_sample=False)

    def answer(work: Work) -> Answer:
        inputs = work.inputs(model.target)
        if settings.get("seed") is not None:
            torch.manual_seed(settings["seed"])
        clock = FirstToken()
        start = time.perf_counter()
        sequences = model.target.model.generate(**inputs, stopping_criteria=[clock], **given)
        tokens = new_tokens(sequences, inputs["input_ids"].shape[1], model.target.eos_token_ids)
        seconds, first = time.perf_counter() - start, (clock.at or start) - start
        stats = Stats(sum(map(len, tokens)), requests=len(tokens), seconds=seconds, first_token=first)
        return Answer(stats, tokens)

    return answer


def with_prompt_lookup(model: MSDModel, settings: Mapping[str, Any], tokens: int) -> Callable[[Work], Answer]:
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
            contestant.rounds.append(contestant.answer(question).stats)
        yield number


def strongest(contestants: Sequence[Contestant]) -> Contestant:
    """The fastest of them in tokens per second."""
    return max(contestants, key=lambda contestant: contestant.total.tokens_per_second)

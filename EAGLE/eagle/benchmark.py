"""Interleaved comparison of ways to decode the same questions.

The contestants take turns, so a slow minute of the machine slows all of them. Speed-up is a ratio within one run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from eagle.decode.compiled.engine import obstacle
from eagle.decode.cycle_log import CycleLog
from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.decode.tree_config import TreeConfig
from eagle.families import Target
from eagle.questions import Conversations, Question
from eagle.report.intervals import Interval, of_mean
from llava.arguments import is_greedy


class Work(Protocol):
    """What a contestant answers: a question or a batch of them."""

    def inputs(self, target: Target) -> dict[str, Any]:
        """Model inputs, [B, S]. They may have settings of `generate` too, which replace those of the contestant."""


class Answer(NamedTuple):
    """Statistics, and the new ``tokens`` of each sequence up to its end token. ``cycles``: the new tokens of a logged
    answer, those of the prefill first, then those of each cycle."""

    stats: Stats
    tokens: list[list[int]]
    cycles: Sequence[list[int]] = ()


def speed(stats: Stats) -> float:
    """Tokens per second."""
    return stats.tokens_per_second


def decoding_speed(stats: Stats) -> float:
    """Tokens per second after the first one."""
    return stats.decoding_speed


@dataclass
class Contestant:
    """One way to decode.

    ``answer``: answers a question or a batch. ``plain``: decodes without speculation, so it may be the baseline of the
    speed-up. ``rounds``: statistics of each round that counts. ``tokens``: its answers in the newest round.
    ``answers``: those of all rounds that count. ``cycles``: of each answer in them that was logged.
    """

    name: str
    answer: Callable[[Any], Answer]
    plain: bool = False
    rounds: list[Stats] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    cycles: list[Sequence[list[int]]] = field(default_factory=list)
    logged: list[Sequence[list[int]]] = field(default_factory=list, repr=False)

    def run(self, work: Sequence[Work]) -> Stats:
        """Answers all of ``work`` once. Returns the statistics of all answers together."""
        total, self.tokens, self.logged = Stats.empty(), [], []
        for each in work:
            answer = self.answer(each)
            total.merge(answer.stats)
            self.tokens += answer.tokens
            self.logged.append(answer.cycles)
        return total

    def part(self, numbers: Sequence[int]) -> Contestant:
        """The same contestant with some of its rounds, if each of them has one answer."""
        return replace(
            self, rounds=[self.rounds[n] for n in numbers], answers=[self.answers[n] for n in numbers], cycles=[]
        )

    @property
    def total(self) -> Stats:
        """All rounds together."""
        total = Stats.empty()
        for stats in self.rounds:
            total.merge(stats)
        return total

    def median(self, value: Callable[[Stats], float], rounds: Sequence[int]) -> float:
        """The median of ``value`` over the given rounds."""
        return statistics.median(value(self.rounds[number]) for number in rounds)

    def spread(self, value: Callable[[Stats], float] = speed, rounds: Sequence[int] | None = None) -> float:
        """Interquartile range of ``value`` over the given rounds (None: all), relative to the median. The whole range
        if there are fewer than four rounds."""
        chosen = range(len(self.rounds)) if rounds is None else rounds
        values = sorted(value(self.rounds[number]) for number in chosen)
        low, high = values[0], values[-1]
        if len(values) >= 4:
            low, _, high = statistics.quantiles(values, n=4)
        return (high - low) / statistics.median(values)


class FirstToken(StoppingCriteria):
    """Never stops; records when transformers' `generate` has its first new token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.at is None:
            if input_ids.device.type != "cpu":
                torch.accelerator.synchronize()
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Ends(StoppingCriteria):
    """Criteria of transformers' `generate`. ``lengths`` [B]: of prompt and answer where a sequence met one of them, 0
    if it did not. `generate` fills it with padding then, until the others of the batch have ended."""

    def __init__(self, criteria: Sequence[Any]) -> None:
        self.criteria, self.lengths = StoppingCriteriaList(criteria), torch.zeros(1, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = self.criteria(input_ids, scores, **kwargs)  # [B]
        lengths = self.lengths.to(input_ids.device)
        self.lengths = torch.where(done & (lengths == 0), input_ids.shape[1], lengths)
        return done


def new_tokens(sequences: Tensor, prompt: int, ends: Sequence[int]) -> list[list[int]]:
    """What transformers' `generate` returns, in the form of `MSDOutput.tokens`.

    Args:
        sequences: [B, P + n] prompts and new tokens.
        prompt: P.
        ends: ids that end an answer.
    """
    found = []
    for tokens in sequences[:, prompt:].tolist():
        stop = next((place for place, token in enumerate(tokens, start=1) if token in ends), len(tokens))
        found.append(tokens[:stop])
    return found


def in_conversations(model: MSDModel, answer: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """``answer``, which asks each turn of a conversation after the answers that it gave to the turns before."""
    conversations = Conversations(model)

    def in_turn(work: Any) -> Answer:
        if not isinstance(work, Question):
            return answer(work)
        asked = conversations.ask(work)
        given = answer(asked)
        conversations.keep(asked, given.tokens[0])
        return given

    return in_turn


def with_engine(
    model: MSDModel, use_msd: bool, settings: Mapping[str, Any], tree: TreeConfig | None = None, log: bool = False
) -> Callable[[Work], Answer]:
    """Decodes with `MSDModel`, with or without the draft. ``log``: keeps the tokens of each cycle; single questions
    only."""

    def answer(work: Work) -> Answer:
        inputs = work.inputs(model.target)
        kept = CycleLog()
        given = {**settings, **inputs}
        output = model.generate(**given, use_msd=use_msd, tree=tree, streamer=kept if log else None)
        return Answer(output.stats, output.tokens, kept.cycles)

    return in_conversations(model, answer)


def with_stop_strings(model: MSDModel) -> dict[str, Any]:
    """Settings with which transformers' own `generate` ends at the stop strings of the checkpoint."""
    texts = model.target.stop_strings
    return {"stop_strings": list(texts), "tokenizer": model.tokenizer} if texts else {}


def with_transformers(model: MSDModel, settings: Mapping[str, Any], **more: Any) -> Callable[[Work], Answer]:
    """Decodes with transformers' own `generate`. ``more``: further settings of it. A seed sets torch's global random
    state, which its sampling uses."""
    given = {key: value for key, value in settings.items() if key not in ("temperature", "seed")} | more
    texts = model.target.stop_strings
    stops = [StopStringCriteria(model.tokenizer, list(texts))] if texts else []
    temperature = settings.get("temperature") or 0.0
    given["do_sample"] = not is_greedy(temperature)
    if given["do_sample"]:
        given["temperature"] = temperature

    def answer(work: Work) -> Answer:
        inputs = {**given, **work.inputs(model.target)}
        if inputs.get("temperature") is None:  # the checkpoint's
            inputs.pop("temperature", None)
        if settings.get("seed") is not None:
            torch.manual_seed(settings["seed"])
        clock, ended = FirstToken(), Ends([*stops, *inputs.pop("stopping_criteria", ())])
        criteria = [clock, ended] if ended.criteria else [clock]
        start = time.perf_counter()
        sequences = model.target.model.generate(**inputs, stopping_criteria=criteria)
        prompt = inputs["input_ids"].shape[1]
        tokens = new_tokens(sequences, prompt, model.target.eos_token_ids)
        limits = ended.lengths.expand(len(tokens)).tolist()
        tokens = [each[: limit - prompt] if limit else each for each, limit in zip(tokens, limits, strict=True)]
        seconds, first = time.perf_counter() - start, (clock.at or start) - start
        stats = Stats(sum(map(len, tokens)), requests=len(tokens), seconds=seconds, first_token=first)
        return Answer(stats, tokens)

    return in_conversations(model, answer)


def with_prompt_lookup(model: MSDModel, settings: Mapping[str, Any], tokens: int) -> Callable[[Work], Answer]:
    """Decodes with transformers' prompt lookup, which guesses ``tokens`` tokens from the text before.

    The ids of image tokens are suppressed: if they were guessed, the forward would fail for lack of their pixels.
    """
    config = model.target.config
    names = ("image_token_id", "video_token_id")
    pictures = [number for name in names if (number := getattr(config, name, None)) is not None]
    return with_transformers(model, settings, prompt_lookup_num_tokens=tokens, suppress_tokens=pictures)


def baselines(
    models: Sequence[MSDModel], settings: Mapping[str, Any], compiled: bool | None = None
) -> list[Contestant]:
    """Plain decoding by our loop and by transformers, for the same base model in each dtype.

    Args:
        compiled: also both of them compiled, transformers' with its static cache. None: on an accelerator, and
            where the model itself is compiled, if it can be.
    """
    found = []
    for model in models:
        dtype = str(model.dtype).removeprefix("torch.")
        eager = model
        if model.backend is not None:
            eager = MSDModel(model.target, compile=False)
            eager.exact_phases = model.exact_phases
        found.append(Contestant(f"autoregressive {dtype}", with_engine(eager, False, settings), plain=True))
        found.append(Contestant(f"transformers generate {dtype}", with_transformers(model, settings), plain=True))
        fits = (model.device.type != "cpu" or model.backend is not None) and obstacle(model.target) is None
        if fits if compiled is None else compiled:
            own = MSDModel(model.target, compile=model.backend or True)
            own.warm_up()
            found.append(Contestant(f"autoregressive {dtype}, compiled", with_engine(own, False, settings), plain=True))
            static = with_transformers(model, settings, cache_implementation="static")
            found.append(Contestant(f"transformers generate {dtype}, static cache", static, plain=True))
    return found


def paired_speedup(own: Contestant, other: Contestant, value: Callable[[Stats], float] = speed) -> Interval | None:
    """How much faster ``own`` is than ``other``, question by question: the mean of the ratios and its 95 % bootstrap
    interval. Long answers count as much as short ones.

    Args:
        value: of which the ratio is taken. Questions without one (an answer of a single token has no speed after the
            first) are left out. Without any question the result is None.
    """
    pairs = [(value(one), value(two)) for one, two in zip(own.rounds, other.rounds, strict=True)]
    return of_mean([one / two for one, two in pairs if one > 0 and two > 0])


def speedups(own: Contestant, best: Contestant, later: Contestant) -> dict[str, Any]:
    """The speed-up of ``own`` in both conventions, the ratio of totals and the mean of the ratios of each question: of
    the whole request over ``best``, and after the first token over ``later``."""
    return {
        "speedup": ratio(own.total.tokens_per_second, best.total.tokens_per_second),
        "paired_speedup": as_mean(paired_speedup(own, best)),
        "after_first_token": {
            "speedup": ratio(own.total.decoding_speed, later.total.decoding_speed),
            "paired_speedup": as_mean(paired_speedup(own, later, decoding_speed)),
            "baseline_name": later.name,
        },
    }


def ratio(one: float, other: float) -> float | None:
    """None if there is nothing to divide by: answers of a single token have no speed after it."""
    return one / other if other else None


def as_mean(interval: Interval | None) -> dict[str, float | None] | None:
    """An interval under the keys of a report."""
    return None if interval is None else {"mean": interval.value, "low": interval.low, "high": interval.high}


def identical(own: Contestant, other: Contestant) -> int:
    """Number of answers that are equal, token for token."""
    return sum(one == two for one, two in zip(own.answers, other.answers, strict=True))


def interleave(contestants: Sequence[Contestant], rounds: Sequence[Sequence[Work]], warm_up: int) -> Iterator[int]:
    """Every contestant answers the work of a round, then every contestant that of the next. Each round starts with
    another contestant.

    Args:
        rounds: the work of each round, such as one question, or the same questions in every round.
        warm_up: number of rounds before them that are not counted. They have the work of the first rounds.

    Yields:
        The number of each finished round, below 0 in the warm-up.
    """
    for number in range(-warm_up, len(rounds)):
        work = rounds[number if number >= 0 else (number + warm_up) % len(rounds)]
        shift = number % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            stats = contestant.run(work)
            if number >= 0:
                contestant.rounds.append(stats)
                contestant.answers += contestant.tokens
                contestant.cycles += contestant.logged
        yield number


def interleave_with_bar(
    contestants: Sequence[Contestant], rounds: Sequence[Sequence[Work]], warm_up: int, title: str, unit: str = "round"
) -> Iterator[int]:
    """`interleave` with a progress bar of the rounds. The warm-up is labelled; neither it nor its time is counted."""
    from tqdm import tqdm

    with tqdm(total=len(rounds), desc=f"{title}, warm-up" if warm_up else title, unit=unit, file=sys.stderr) as bar:
        for number in interleave(contestants, rounds, warm_up):
            if number >= 0:
                bar.update()
            elif number == -1:
                bar.set_description(title, refresh=False)
                bar.reset()
            yield number


@dataclass(frozen=True)
class Quiet:
    """``rounds``: those that count. ``noisy``: those disturbed by another load of the machine. ``doubtful``: more than
    half are noisy, so all of them count."""

    rounds: tuple[int, ...]
    noisy: tuple[int, ...]
    doubtful: bool


def find_quiet(contestants: Sequence[Contestant], tolerance: float) -> Quiet:
    """Finds the noisy rounds, if all rounds have the same work. A round is noisy if the time of a contestant differs
    from its median by more than the factor 1 + ``tolerance``."""
    count = len(contestants[0].rounds)
    noisy = set()
    for contestant in contestants:
        middle = statistics.median(stats.seconds for stats in contestant.rounds)
        limits = middle / (1 + tolerance), middle * (1 + tolerance)
        noisy |= {n for n, stats in enumerate(contestant.rounds) if not limits[0] <= stats.seconds <= limits[1]}
    quiet = tuple(number for number in range(count) if number not in noisy)
    doubtful = 2 * len(quiet) < count
    return Quiet(tuple(range(count)) if doubtful else quiet, tuple(sorted(noisy)), doubtful)


def strongest(contestants: Sequence[Contestant], value: Callable[[Stats], float] = speed) -> Contestant:
    """The one with the largest ``value`` of all rounds together: the fastest in tokens per second."""
    return max(contestants, key=lambda contestant: value(contestant.total))

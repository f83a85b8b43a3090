"""Tests if sampled output has the target's distribution: chi-square over many draws of real trees.

For one prompt the engine samples a first token, drafts a tree and verifies it once. Then sampling and acceptance run
``draws`` times on the same logits, as in decoding, each time with new noise for each position. Each resulting token is
counted at the node where it was sampled. All settings use the same noise. At every node with enough counts, these are
compared with the target's processed distribution. A token sampled at a node without drafted children is a bonus token
after full acceptance. One that leaves the tree at a node with children is a bonus token after partial acceptance: it is
among the counts of its node, and also compared with the target's distribution over the tokens not drafted there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from eagle.decode.accept import accepted_nodes
from eagle.decode.decoder import Decoder, DecodingSettings, steps_between
from eagle.decode.msd import MSDModel
from eagle.decode.noise import Noise, gumbel
from eagle.decode.sampling import Sampler
from eagle.decode.stopping import Stopper
from eagle.decode.tree import DraftTree
from eagle.decode.tree_config import TreeConfig
from eagle.families import Target

AT_ONCE = 1 << 22  # noise values drawn at once, for all draws, positions and tokens
MANY_STEPS = 4  # steps of the dtype between two logits; more than rounding explains
ENOUGH = 500  # a node is tested from this many draws on
FIRST, ROOT, INNER = "first token", "second token", "inside the tree"
PARTIAL, FULL = "bonus after partial acceptance", "bonus after full acceptance"
POOLED = 5.0  # categories with a smaller expected count are counted together

SETTINGS: dict[str, dict[str, float]] = {
    "T 0.3": {"temperature": 0.3},
    "T 0.7": {"temperature": 0.7},
    "T 1.0": {"temperature": 1.0},
    "T 1.5": {"temperature": 1.5},
    "top-k 3": {"top_k": 3},
    "top-p 0.8": {"top_p": 0.8},
    "T 0.7, top-k 20, top-p 0.9": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "T 1.5, top-k 50": {"temperature": 1.5, "top_k": 50},
    "T 1.5, top-p 0.95": {"temperature": 1.5, "top_p": 0.95},
    "T 4.0": {"temperature": 4.0},
    "T 4.0, top-k 20, top-p 0.9": {"temperature": 4.0, "top_k": 20, "top_p": 0.9},
}
"""The last two are higher than in practice: they spread the answers of a small model with sharp distributions."""


def processors_of(settings: Mapping[str, float]) -> LogitsProcessorList:
    """transformers' processors for settings, in the order in which its `generate` applies them."""
    made: list[Any] = []
    if settings.get("temperature", 1.0) != 1.0:
        made.append(hf.TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        made.append(hf.TopKLogitsWarper(int(settings["top_k"])))
    if "top_p" in settings:
        made.append(hf.TopPLogitsWarper(settings["top_p"]))
    return LogitsProcessorList(made)


@dataclass(frozen=True)
class Fit:
    """One comparison.

    ``where``: position of the token in the answer. ``nodes``: number of compared nodes. ``variation``: total variation
    distance between counts and distribution. ``p``: chi-square p-value, 0 if an impossible token was sampled.
    """

    setting: str
    where: str
    nodes: int
    draws: int
    variation: float
    p: float


class Recorder(Sampler):
    """A greedy sampler that records its logits [N, V]."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList(), do_sample=False)
        self.seen: list[Tensor] = []

    def sample(self, logits: Tensor, prefix: Tensor, noise: Tensor | None = None) -> Tensor:
        self.seen.append(logits.float())
        return super().sample(logits, prefix, noise)


@torch.inference_mode()
def first_cycle(model: MSDModel, inputs: Mapping[str, Any], tree: TreeConfig) -> tuple[Tensor, DraftTree, Tensor]:
    """The target's logits [1, V] for the first token, the engine's first tree, and the logits [N, V] at its nodes."""
    sampler, stopper = Recorder(), Stopper([], inputs["input_ids"].shape[1])
    stopper.max_new_tokens = tree.depth + 3
    decoder = Decoder(model.target, model.draft, dict(inputs), DecodingSettings(sampler, stopper, tree))
    decoder.prefill()
    verified = decoder.verify(decoder.draft())
    return sampler.seen[0], verified.drafted.trees[0], verified.logits[0].float()


def noises(places: int, logits: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """Noise for ``draws`` answers sampled from logits [..., V], in parts [n, places, V]."""
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    part = max(1, AT_ONCE // (places * logits.shape[-1]))
    for start in range(0, draws, part):
        yield gumbel([min(part, draws - start), places, logits.shape[-1]], generator, logits.device)


def choices(tree: DraftTree, scores: Tensor, sampler: Sampler, noise: Tensor) -> Tensor:
    """[draws, N] the target's choice at each node that a draw reaches, with the draw's noise for the node's position.
    -1 at nodes that it does not reach.

    Args:
        scores: [N, V] processed.
        noise: [draws, D, V] of the positions after the root.
    """
    possible = (scores > -torch.inf).any(dim=0).nonzero()[:, 0]  # [v]
    few = len(possible) < scores.shape[1] / 4  # after top-k or top-p
    scores = scores[:, possible] if few else scores
    chosen = torch.full((len(noise), tree.size), -1, device=noise.device)
    nodes = zip(tree.parents.tolist(), tree.tokens.tolist(), tree.depths.tolist(), strict=True)
    for node, (parent, token, depth) in enumerate(nodes):
        here = torch.arange(len(noise)) if node == 0 else (chosen[:, parent] == token).nonzero()[:, 0]
        own = noise[:, depth].index_select(0, here.to(noise.device))  # [n, V]
        if few:
            own = own.index_select(1, possible)
        picked = sampler.select(scores[node], own)
        chosen[here, node] = possible[picked] if few else picked
    return chosen


def tally(tree: DraftTree, chosen: Tensor, vocabulary: int) -> Tensor:
    """[N, V] how often each token was sampled at each node, from choices [draws, N]. Every accepted node gives one."""
    accepted = accepted_nodes(tree, chosen).long()  # [draws, N]
    return chosen.new_zeros(tree.size, vocabulary).scatter_add_(1, chosen.clamp(min=0).T, accepted.T)


def pooled(counts: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Observed and expected counts with rare categories joined; both [C], float64."""
    expected = probabilities.double() * counts.sum()
    common = expected >= POOLED
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    if expected[-1] < POOLED and len(expected) > 1:  # the rare categories together are still too rare
        smallest = int(expected[:-1].argmin())
        observed[smallest] += observed[-1]
        expected[smallest] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    return observed, expected


def place_of(tree: DraftTree, node: int) -> str:
    """Position in the answer of a token sampled at a node."""
    if node == 0:
        return ROOT
    return INNER if bool((tree.parents == node).any()) else FULL


def compare(
    tree: DraftTree, logits: Tensor, counts: Tensor, processors: LogitsProcessorList, setting: str
) -> list[Fit]:
    """One `Fit` for each kind of place; the chi-square statistics of its nodes are joined."""
    wanted = distribution(logits, processors)  # [N, V]
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for node in range(tree.size):
        drafted = tree.tokens[tree.parents == node]  # tokens of its children
        others = counts[node].index_fill(0, drafted, 0)
        if int(counts[node].sum()) >= ENOUGH:
            groups.setdefault(place_of(tree, node), []).append((counts[node], wanted[node]))
        if len(drafted) and int(others.sum()) >= ENOUGH:
            left = wanted[node].index_fill(0, drafted, 0.0)
            groups.setdefault(PARTIAL, []).append((others, left / left.sum()))
    return [fit_of(setting, place, pairs) for place, pairs in groups.items()]


def distribution(logits: Tensor, processors: LogitsProcessorList) -> Tensor:
    """Processed probabilities [N, V] of logits [N, V], float64."""
    scores: Tensor = processors(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone())
    return scores.double().softmax(-1)


def fit_of(setting: str, place: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Fit:
    """The comparison of counts [V] with probabilities [V] at some nodes, taken together."""
    impossible = any(int(counts[wanted == 0].sum()) for counts, wanted in pairs)
    parts = [pooled(counts, wanted) for counts, wanted in pairs]
    total = sum(int(counts.sum()) for counts, _ in pairs)
    variation = sum(float((observed - expected).abs().sum()) / 2 for observed, expected in parts) / total
    statistics = [(float(((o - e)[e > 0] ** 2 / e[e > 0]).sum()), int((e > 0).sum()) - 1) for o, e in parts]
    return Fit(setting, place, len(pairs), total, variation, 0.0 if impossible else joined_p(statistics))


def joined_p(statistics: Sequence[tuple[float, int]]) -> float:
    """p-value of independent chi-square statistics (value, degrees of freedom) taken together."""
    freedom = sum(degrees for _, degrees in statistics)
    if freedom < 1:
        return 1.0
    value = sum(number for number, _ in statistics)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(value / 2).double()))


def significant(fits: Sequence[Fit], level: float = 0.001) -> list[Fit]:
    """The comparisons that fail at ``level`` for all of them together (Bonferroni)."""
    return [fit for fit in fits if fit.p < level / len(fits)]


def check_prompt(
    model: MSDModel,
    inputs: Mapping[str, Any],
    tree: TreeConfig,
    draws: int,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, float]] = SETTINGS,
) -> list[Fit]:
    """All settings on one prompt."""
    first, drafted, logits = first_cycle(model, inputs, tree)
    prefix = torch.zeros(1, 1, dtype=torch.long, device=logits.device)
    samplers = {name: Sampler(processors_of(setting), True) for name, setting in settings.items()}
    scores = {name: sampler.scores(torch.cat([first, logits]), prefix) for name, sampler in samplers.items()}
    firsts = {name: torch.zeros_like(first[0], dtype=torch.long) for name in settings}
    counts = {name: torch.zeros_like(logits, dtype=torch.long) for name in settings}
    for noise in noises(int(drafted.depths.max()) + 2, logits, draws, seed):
        for name, sampler in samplers.items():
            tokens = sampler.select(scores[name][:1], noise[:, :1])[:, 0]
            firsts[name] += tokens.bincount(minlength=first.shape[-1])
            chosen = choices(drafted, scores[name][1:], sampler, noise[:, 1:])
            counts[name] += tally(drafted, chosen, first.shape[-1])
    fits = []
    for name, sampler in samplers.items():
        fits.append(fit_of(name, FIRST, [(firsts[name], distribution(first, sampler.processors)[0])]))
        fits += compare(drafted, logits, counts[name], sampler.processors, name)
    return fits


class AddNoise(LogitsProcessor):
    """Adds the noise of one sequence to the scores: a greedy search then samples as MSD does with the same seed.

    Args:
        prompt: [1, P] ids.
    """

    def __init__(self, seed: int, prompt: Tensor) -> None:
        generator = torch.Generator(device=prompt.device).manual_seed(seed)
        self.start, self.noise = prompt.shape[1], Noise(generator, prompt.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] for the token after ``input_ids`` [1, S]."""
        return scores + self.noise.rows(input_ids.shape[1] - self.start, 1, scores.shape[-1])


def noise_processors(temperature: float, seed: int, prompt: Tensor) -> LogitsProcessorList:
    """Processors with which transformers' greedy search samples at this temperature as MSD does. ``prompt`` [1, P]."""
    return LogitsProcessorList([hf.TemperatureLogitsWarper(temperature), AddNoise(seed, prompt)])


class Gap(NamedTuple):
    """How close the target's logits of two tokens are at one place. ``expected``, ``found``: the tokens; ``logits``:
    theirs; ``steps``: their distance in steps of the target's dtype at that size."""

    expected: int
    found: int
    logits: tuple[float, float]
    steps: float


@torch.inference_mode()
def logit_gap(target: Target, inputs: Mapping[str, Any], expected: Tensor, place: int, found: int) -> Gap:
    """The gap between the expected token and another one.

    A forward of several tokens rounds in another way than a forward of one, so in 16 bit two answers may differ where
    two logits are nearly equal. A gap of more than `MANY_STEPS` is not rounding.

    Args:
        inputs: of the prompt, [1, P].
        expected: [P + n] prompt and answer.
        place: index of the token in ``expected``.
        found: the other answer's token there.
    """
    ids = expected[:place].unsqueeze(0)  # [1, place]
    hidden = target.prefill({**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).hidden
    row = target.head(hidden[:, -1])[0]  # [V]
    token = int(expected[place])
    first, second = row[token], row[found]
    return Gap(token, found, (float(first), float(second)), float(steps_between(first, second)))


def first_difference(expected: Tensor, actual: Tensor) -> int | None:
    """Index of the first token at which two sequences [S] differ, in content or length; None if they are equal."""
    shared = min(len(expected), len(actual))
    differing = (expected[:shared] != actual[:shared]).nonzero()
    if len(differing):
        return int(differing[0])
    return None if len(expected) == len(actual) else shared

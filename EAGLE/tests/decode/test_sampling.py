"""Sampled output has exactly the target's distribution, bonus tokens included: chi-square over many draws."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from eagle import MSDModel, TreeConfig
from eagle.decode.noise import gumbel
from eagle.decode.sampling import Sampler
from eagle.decode.tree import DraftTree, ancestor_mask
from eagle.exactness import (
    FIRST,
    FULL,
    INNER,
    PARTIAL,
    ROOT,
    SETTINGS,
    check_prompt,
    choices,
    compare,
    joined_p,
    noises,
    pooled,
    processors_of,
    significant,
    tally,
)  # fmt: skip
from eagle.families import load_target
from eagle.questions import read_questions

VOCABULARY, DRAWS = 8, 50_000
PLACES = {ROOT, INNER, PARTIAL, FULL}
REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("sampling")
    base = make_liuhaotian(folder / "base")
    draft = make_draft(folder / "draft", load_target(base, dtype=torch.float32), agree=1.0)
    return MSDModel.from_pretrained(base, draft, dtype=torch.float32)


def drawn_tree() -> DraftTree:
    """Root, children 0 and 1, and below child 0 the tokens 1 and 2: some draws leave the tree at once (no drafted
    token accepted), some after one, some take the bonus token after a whole path."""
    parents = torch.tensor([-1, 0, 0, 1, 1])
    mask = ancestor_mask(parents)
    return DraftTree(torch.tensor([7, 0, 1, 1, 2]), parents, mask.sum(-1) - 1, mask, torch.zeros(5))


def node_logits() -> torch.Tensor:
    """[5, V] target logits at the nodes; the first drafted path is likely, so that all its nodes are visited."""
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(3))
    logits[0, 0] += 2.0
    logits[1, 1] += 2.0
    return logits  # at T 1.5 a full path still comes out 5 000 times in 50 000 draws


class RawBonus(Sampler):
    """A mutant: the bonus token after full acceptance ignores temperature, top-k and top-p."""

    def scores(self, logits: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        leaves = torch.tensor([False, False, True, True, True])
        return torch.where(leaves[:, None], logits, super().scores(logits, prefix))


def chosen_by(sampler: Sampler) -> torch.Tensor:
    """[DRAWS, N] choices at the nodes of `drawn_tree`."""
    tree, logits = drawn_tree(), node_logits()
    scores = sampler.scores(logits, torch.zeros(1, 1, dtype=torch.long))
    return torch.cat([choices(tree, scores, sampler, part) for part in noises(3, logits, DRAWS, 5)])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_token_has_the_targets_distribution(name: str) -> None:
    tree, logits, processors = drawn_tree(), node_logits(), processors_of(SETTINGS[name])
    counts = tally(tree, chosen_by(Sampler(processors, True)), VOCABULARY)
    fits = compare(tree, logits, counts, processors, name)
    assert {fit.where for fit in fits} == PLACES
    assert not significant(fits)
    assert all(fit.variation < (VOCABULARY / fit.draws) ** 0.5 for fit in fits)


@pytest.mark.parametrize("name", ["T 0.3", "T 1.5", "top-k 3", "top-p 0.8"])
def test_a_bonus_token_that_ignores_the_settings_is_seen(name: str) -> None:
    tree, logits, processors = drawn_tree(), node_logits(), processors_of(SETTINGS[name])
    counts = tally(tree, chosen_by(RawBonus(processors, True)), VOCABULARY)
    failed = significant(compare(tree, logits, counts, processors, name))
    assert [fit.where for fit in failed] == [FULL]


@pytest.mark.parametrize("name", ["T 0.3", "T 1.5", "T 4.0"])
def test_leaving_the_tree_with_a_token_that_ignores_the_settings_is_seen(name: str) -> None:
    """A mutant whose bonus token after partial acceptance, that leaves `drawn_tree`, is a raw one."""
    tree, logits, processors = drawn_tree(), node_logits(), processors_of(SETTINGS[name])
    chosen, generator = chosen_by(Sampler(processors, True)), torch.Generator().manual_seed(5)
    for node in (0, 1):
        drafted = tree.tokens[tree.parents == node]
        raw = logits[node].softmax(-1).index_fill(0, drafted, 0.0)
        leaves = ~torch.isin(chosen[:, node], drafted)
        chosen[leaves, node] = torch.multinomial(raw, int(leaves.sum()), replacement=True, generator=generator)
    counts = tally(tree, chosen, VOCABULARY)
    failed = {fit.where for fit in significant(compare(tree, logits, counts, processors, name))}
    assert PARTIAL in failed and FULL not in failed


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2vl", marks=pytest.mark.slow)])
def test_trees_of_the_engine_pass(name: str) -> None:
    """A trained pair: its first token and the whole of its first tree, as `msd exactness` does it."""
    pair = MSDModel.from_pretrained(REPO / "pocket" / name, REPO / "pocket" / f"{name}-msd", dtype=torch.float32)
    question = read_questions(REPO / "pocket" / "data" / "heldout.jsonl", 1)[0]
    draws = 10_000  # the command takes 50 000
    fits = check_prompt(pair, question.inputs(pair.target), TreeConfig(6, 3, 12), draws)
    assert {fit.setting for fit in fits} == set(SETTINGS)
    assert {fit.where for fit in fits} == PLACES | {FIRST}
    assert all(fit.draws == draws for fit in fits if fit.where in (FIRST, ROOT))
    assert not significant(fits)


@torch.inference_mode()
def path_probabilities(model: MSDModel, inputs: dict, processors: LogitsProcessorList, length: int) -> dict:
    """Probability of every possible answer of ``length`` tokens, by plain forwards."""
    paths = {(): 1.0}
    for _ in range(length):
        longer = {}
        for path, probability in paths.items():
            ids = torch.cat([inputs["input_ids"], torch.tensor([path], dtype=torch.long)], dim=1)
            full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            scores = processors(ids, model.target.model(**full).logits[:, -1].float())[0].double().softmax(-1)
            for token in scores.nonzero().flatten().tolist():
                longer[(*path, token)] = probability * float(scores[token])
        paths = longer
    return paths


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "top_k": 3, "repetition_penalty": 1.5},  # which looks at the tokens before
        pytest.param({"temperature": 0.8, "top_k": 3}, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.3, "top_k": 3}, marks=pytest.mark.slow),
        pytest.param({"temperature": 1.5, "top_k": 4, "top_p": 0.7}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_whole_answers_have_the_targets_distribution(model: MSDModel, settings: dict[str, float]) -> None:
    """From prompt to answer through `generate`: three tokens, that is a prefill and at least one verified tree."""
    inputs = model.target.prepare("USER: <image>\nHow many? ASSISTANT:", [make_image()])
    processors = processors_of(settings)
    if "repetition_penalty" in settings:
        processors.insert(0, hf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    wanted = path_probabilities(model, inputs, processors, 3)
    counts, accepted = dict.fromkeys(wanted, 0), 0
    for seed in range(8):
        output = model.generate(
            **inputs, **{"top_p": 1.0, **settings}, do_sample=True, seed=seed, num_return_sequences=250,
            max_new_tokens=3, tree=TreeConfig(1, 40, 60), eos_token_id=None,
        )  # fmt: skip
        accepted += sum(output.stats.accept_lengths)
        for row in output.sequences[:, -3:].tolist():
            counts[tuple(row)] += 1
    assert accepted > 60
    observed, expected = pooled(torch.tensor(list(counts.values())), torch.tensor(list(wanted.values())))
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert len(expected) > 3
    assert joined_p([(statistic, len(expected) - 1)]) > 1e-3


def test_a_rare_token_beside_a_certain_one_is_no_misfit() -> None:
    """Expected 0.5 times and seen twice: chi-square is no test of so few, and must not take it for one."""
    observed, expected = pooled(torch.tensor([49_998, 2]), torch.tensor([0.99999, 0.00001]))
    assert observed.tolist() == [50_000]
    assert expected.tolist() == pytest.approx([50_000])


def test_chi_square_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    observed, expected = torch.tensor([18.0, 30.0, 52.0]), torch.tensor([25.0, 25.0, 50.0])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert joined_p([(statistic, 2)]) == pytest.approx(float(stats.chisquare(observed, expected).pvalue), rel=1e-6)


@pytest.mark.parametrize("name", ["T 1.5", "T 0.7, top-k 20, top-p 0.9"])
def test_a_choice_with_noise_is_a_sample(name: str) -> None:
    logits, prefix, processors = node_logits(), torch.zeros(1, 1, dtype=torch.long), processors_of(SETTINGS[name])
    noise = gumbel([DRAWS * len(logits), VOCABULARY], torch.Generator().manual_seed(1), "cpu")
    chosen = Sampler(processors, True).sample(logits.repeat(DRAWS, 1), prefix, noise).view(DRAWS, -1)
    wanted = processors(prefix.expand(len(logits), -1), logits.clone()).softmax(-1)
    counts = torch.stack([row.bincount(minlength=VOCABULARY) for row in chosen.T])
    pairs = [pooled(counts[node], wanted[node]) for node in range(len(logits))]
    statistics = [(float(((o - e) ** 2 / e)[e > 0].sum()), int((e > 0).sum()) - 1) for o, e in pairs]
    assert joined_p(statistics) > 1e-4
    assert not counts[wanted == 0].any()


def test_greedy_needs_no_processor_and_reads_the_largest() -> None:
    sampler = Sampler(LogitsProcessorList(), do_sample=False)
    assert sampler.sample(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.zeros(1, 1)).tolist() == [1, 0]


def test_settings_cover_what_users_turn() -> None:
    wanted = itertools.chain((f"T {t}" for t in (0.3, 0.7, 1.0, 1.5)), ("top-k 3", "top-p 0.8"))
    assert set(wanted) <= set(SETTINGS)


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_on_another_device_than_the_prompt(do_sample: bool) -> None:
    """A model spread over several devices has its head on the last one, and processors' tensors with the prompt; fake
    tensors know devices without having them."""
    with FakeTensorMode():
        prefix = torch.zeros(1, 5, dtype=torch.long, device="cuda:0")
        ends = torch.tensor([2], device="cuda:0")
        processors = LogitsProcessorList(
            [
                hf.RepetitionPenaltyLogitsProcessor(1.05),
                hf.MinNewTokensLengthLogitsProcessor(1, 8, ends, device="cuda:0"),
            ]
        )
        noise = torch.zeros(3, 20, device="cuda:0") if do_sample else None
        sampler = Sampler(processors, do_sample)
        chosen = sampler.sample(torch.zeros(3, 20, dtype=torch.bfloat16, device="cuda:1"), prefix, noise)
        assert chosen.shape == (3,)


@pytest.mark.parametrize(
    ("sharpness", "top_k", "sorts"), [(4.0, None, False), (4.0, 50, False), (0.1, None, True)], ids=str
)
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.95])
def test_top_p_is_that_of_transformers_without_a_full_sort(
    monkeypatch: pytest.MonkeyPatch, sharpness: float, top_k: int | None, sorts: bool, top_p: float
) -> None:
    """A flat distribution, whose best tokens do not hold the mass, is sorted."""
    logits = sharpness * torch.randn(6, 20_000, generator=torch.Generator().manual_seed(1))
    processors = LogitsProcessorList([hf.TopPLogitsWarper(top_p)])
    if top_k is not None:
        processors.insert(0, hf.TopKLogitsWarper(top_k))
    prefix, real, sorted_rows = torch.zeros(1, 1, dtype=torch.long), torch.sort, []
    wanted = processors(prefix.expand(6, -1), logits.clone())
    monkeypatch.setattr(torch, "sort", lambda *given, **how: (sorted_rows.append(1), real(*given, **how))[1])
    sampler = Sampler(processors, do_sample=True)
    assert sampler.row_wise and torch.equal(sampler.scores(logits, prefix), wanted)
    assert bool(sorted_rows) is (sorts and top_p > 0)

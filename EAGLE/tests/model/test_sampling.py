"""Sampled output has exactly the target's distribution, the bonus token included: chi-square over many draws."""

import pytest
import torch
from scipy import stats
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from eagle.model.accept import accept_all_at_once
from eagle.model.sampling import TokenChooser
from eagle.model.tree import DraftTree, ancestor_mask

VOCABULARY, DRAWS = 8, 20_000
SETTINGS = {
    "T 0.3": [TemperatureLogitsWarper(0.3)],
    "T 0.7": [TemperatureLogitsWarper(0.7)],
    "T 1.0": [],
    "T 1.5": [TemperatureLogitsWarper(1.5)],
    "top-k 3": [TopKLogitsWarper(3)],
    "top-p 0.8": [TopPLogitsWarper(0.8)],
    "T 0.7 top-k 5 top-p 0.9": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9)],
}


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
    return logits


def draw(processors, choose_bonus=None) -> dict[tuple[int, ...], torch.Tensor]:
    """Counts of the next token, by the path before it: 'next after nothing', 'next after 0', 'next after 0 1'."""
    tree, logits = drawn_tree(), node_logits()
    chooser = TokenChooser(LogitsProcessorList(processors), True, torch.Generator().manual_seed(5))
    counts = {(): torch.zeros(VOCABULARY), (0,): torch.zeros(VOCABULARY), (0, 1): torch.zeros(VOCABULARY)}
    chosen = chooser.choose(logits.repeat(DRAWS, 1), torch.zeros(1, 1, dtype=torch.long)).view(DRAWS, 5)
    for row in chosen:
        accepted = accept_all_at_once(tree, row)
        if choose_bonus is not None:
            accepted.tokens[-1] = choose_bonus(logits[accepted.path[-1]])
        for length in range(len(accepted.tokens)):
            path = tuple(accepted.tokens[:length])
            if path in counts:
                counts[path][accepted.tokens[length]] += 1
    return counts


def p_value(counts: torch.Tensor, logits: torch.Tensor, processors) -> float:
    """Chi-square of counts against the processed distribution; 0 where an impossible token came out."""
    scores = LogitsProcessorList(processors)(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())
    expected = scores[0].double().softmax(-1) * counts.double().sum()
    if counts[expected == 0].sum() > 0:
        return 0.0
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = expected > 0
    if keep.sum() < 2:
        return 1.0
    return float(stats.chisquare(observed[keep], expected[keep]).pvalue)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_token_has_the_targets_distribution(name):
    processors, logits = SETTINGS[name], node_logits()
    counts = draw(processors)
    for path, node in {(): 0, (0,): 1, (0, 1): 3}.items():
        assert counts[path].sum() > 300, "the tree must be entered often enough to say anything"
        assert p_value(counts[path], logits[node], processors) > 1e-3, (name, path)


def test_the_test_sees_a_bonus_token_that_ignores_the_temperature():
    processors, logits = SETTINGS["T 0.3"], node_logits()
    generator = torch.Generator().manual_seed(6)

    def from_raw_logits(row):
        return int(torch.multinomial(row.softmax(-1), 1, generator=generator))

    counts = draw(processors, choose_bonus=from_raw_logits)
    assert p_value(counts[(0, 1)], logits[3], processors) < 1e-6


def test_greedy_needs_no_processor_and_reads_the_largest():
    chooser = TokenChooser(LogitsProcessorList(), do_sample=False)
    assert chooser.choose(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.zeros(1, 1)).tolist() == [1, 0]


def test_same_seed_same_tokens():
    logits = node_logits()

    def tokens(seed):
        chooser = TokenChooser(LogitsProcessorList(), True, torch.Generator().manual_seed(seed))
        return chooser.choose(logits.repeat(20, 1), torch.zeros(1, 1, dtype=torch.long)).tolist()

    assert tokens(1) == tokens(1) != tokens(2)

"""Trees drawn by hand, with every integer worked out."""

import math

import pytest
import torch

from eagle.decode.tree import (
    Candidates,
    ancestor_mask,
    choose_frontier,
    leaf_paths,
    root_only,
    select_nodes,
)
from eagle.drafts.modules import top_children

# The tree of eagle/decode/tree.py:  R ─┬─ a(-0.1) ─┬─ c(-0.3)
#                                      │           └─ d(-2.0)
#                                      └─ b(-0.5) ─┬─ e(-0.9)
#                                                  └─ f(-3.0)
A, B, C, D, E, F, R = 11, 12, 13, 14, 15, 16, 10
DRAWN = Candidates(
    tokens=torch.tensor([A, B, C, D, E, F]),
    scores=torch.tensor([-0.1, -0.5, -0.3, -2.0, -0.9, -3.0]),
    parents=torch.tensor([-1, -1, 0, 0, 1, 1]),
)


def test_select_keeps_the_best_nodes_in_draft_order():
    tree = select_nodes(DRAWN, torch.tensor([R]), total_tokens=5)
    assert tree.tokens.tolist() == [R, A, B, C, E]
    assert tree.parents.tolist() == [-1, 0, 0, 1, 2]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2]
    assert tree.mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]
    assert leaf_paths(tree).tolist() == [[0, 1, 3], [0, 2, 4]]


def test_select_drops_a_whole_branch_and_pads_shorter_paths():
    tree = select_nodes(DRAWN, torch.tensor([R]), total_tokens=4)
    assert tree.tokens.tolist() == [R, A, B, C]
    assert leaf_paths(tree).tolist() == [[0, 2, -1], [0, 1, 3]]


def test_select_takes_all_when_fewer_were_drafted_than_allowed():
    tree = select_nodes(DRAWN, torch.tensor([R]), total_tokens=60)
    assert tree.tokens.tolist() == [R, A, B, C, D, E, F]
    assert tree.parents.tolist() == [-1, 0, 0, 1, 1, 2, 2]


def test_a_child_as_good_as_its_parent_never_loses_it():
    """A certain child (log-probability 0) scores as its parent does; the parent must still be chosen first."""
    chain = Candidates(torch.arange(6), torch.zeros(6), torch.tensor([-1, 0, 1, 2, 3, 4]))
    for total in range(2, 7):
        tree = select_nodes(chain, torch.tensor([R]), total)
        assert tree.parents.tolist() == list(range(-1, total - 1))


def test_root_only():
    tree = root_only(torch.tensor([R]))
    assert (tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist()) == ([R], [-1], [0])
    assert tree.mask.tolist() == [[True]]


@pytest.mark.parametrize("depth", [None, 4])
def test_ancestor_mask_of_a_chain_is_lower_triangular(depth):
    assert torch.equal(ancestor_mask(torch.tensor([-1, 0, 1, 2, 3]), depth), torch.ones(5, 5).tril().bool())


def test_top_children_gives_log_probabilities():
    ids, logprobs = top_children(torch.tensor([[0.0, 2.0, 1.0, -1.0]]), top_k=2)
    assert ids.tolist() == [[1, 2]]
    total = sum(math.exp(x) for x in (0, 2, 1, -1))
    assert logprobs[0].tolist() == pytest.approx([math.log(math.exp(x) / total) for x in (2, 1)], abs=1e-6)


def test_a_tree_of_what_is_no_number_is_a_tree():
    """The first level is sound, what follows a is not: nothing of it comes before its parent."""
    nan = torch.full((4,), math.nan)
    ids, scores = top_children(torch.stack([torch.tensor([3.0, 1.0, 0.0, 2.0]), nan]), 2)
    assert scores[0].isfinite().all() and scores[1].tolist() == [-math.inf, -math.inf]
    assert ((ids >= 0) & (ids < 4)).all()
    below = scores[0][:1] + scores[1]  # [2] paths through a
    drafted = Candidates(torch.cat([ids[0], ids[1]]), torch.cat([scores[0], below]), torch.tensor([-1, -1, 0, 0]))
    for total in range(1, 6):
        tree = select_nodes(drafted, torch.tensor([R]), total)
        assert tree.parents.tolist() == [-1, 0, 0, 1, 1][:total]
        assert tree.depths.tolist() == [0, 1, 1, 2, 2][:total]


def test_frontier_names_each_childs_row():
    flat, rows = choose_frontier(torch.tensor([[-0.2, -1.0], [-0.5, -0.6]]), top_k=3)
    assert (flat.tolist(), rows.tolist()) == ([0, 2, 3], [0, 1, 1])

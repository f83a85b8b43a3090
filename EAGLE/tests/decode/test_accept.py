"""Acceptance on a drawn tree, with a target that never, always or sometimes agrees."""

import torch

from eagle.decode.accept import accept_all_at_once, accept_step_by_step
from eagle.decode.tree import DraftTree, ancestor_mask

# node:        0   1   2   3   4   5
# token:      10  11  12  13  14  13
TOKENS = [10, 11, 12, 13, 14, 13]
PARENTS = [-1, 0, 0, 1, 1, 2]


def drawn_tree() -> DraftTree:
    parents = torch.tensor(PARENTS)
    mask = ancestor_mask(parents)
    return DraftTree(torch.tensor(TOKENS), parents, mask.sum(-1) - 1, mask, torch.zeros(6))


def both_ways(chosen: list[int]):
    """The two walks must agree; returns what they say."""
    tree = drawn_tree()
    (at_once,) = accept_all_at_once([tree], [torch.tensor(chosen)])
    assert accept_step_by_step(tree, lambda node, added: chosen[node]) == at_once
    return at_once


def test_never_agrees_gives_the_targets_token_alone():
    assert both_ways([99, 99, 99, 99, 99, 99]) == ([0], [99])


def test_always_agrees_gives_the_whole_path_and_a_bonus_token():
    assert both_ways([11, 14, 0, 0, 77, 0]) == ([0, 1, 4], [11, 14, 77])


def test_sometimes_agrees_stops_at_the_first_disagreement():
    assert both_ways([12, 13, 99, 0, 0, 13]) == ([0, 2], [12, 99])


def test_the_same_token_in_two_branches_is_told_apart():
    """Token 13 is drafted below node 1 and below node 2; only the one below the accepted parent counts."""
    assert both_ways([12, 13, 13, 50, 51, 52]) == ([0, 2, 5], [12, 13, 52])


def test_a_root_whose_token_equals_the_choice_at_the_last_node_is_not_its_child():
    """The root's parent index is -1, which indexes the last node; the root must not be judged by it."""
    assert both_ways([11, 99, 0, 0, 0, 99]) == ([0, 1], [11, 99])


def test_a_batch_is_accepted_with_one_copy_to_the_host(monkeypatch):
    """Trees of different size, each with its own choices."""
    small = DraftTree(*(part[..., :3] for part in drawn_tree()[:3]), drawn_tree().mask[:3, :3], torch.zeros(3))
    choices = [torch.tensor([11, 14, 0, 0, 77, 0]), torch.tensor([12, 0, 55])]
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copies.append(tensor.shape), cpu(tensor))[1])
    assert accept_all_at_once([drawn_tree(), small], choices) == [([0, 1, 4], [11, 14, 77]), ([0, 2], [12, 55])]
    assert len(copies) == 1


def test_step_by_step_shows_each_choice_the_tokens_before_it():
    seen = []

    def choose(node: int, added: list[int]) -> int:
        seen.append((node, list(added)))
        return {0: 11, 1: 13, 3: 42}[node]

    assert accept_step_by_step(drawn_tree(), choose) == ([0, 1, 3], [11, 13, 42])
    assert seen == [(0, []), (1, [11]), (3, [11, 13])]

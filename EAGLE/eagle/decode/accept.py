"""Acceptance: the drafted path that the target would have produced itself. Pure tensor functions.

The target chooses one next token at every node of the tree: the arg-max, or a sample of its processed distribution.
A drafted node is accepted if its token is the one chosen at its parent and its parent is accepted. The choice at the
last accepted node is the bonus token.

Sampling is lossless too. The tree is a function of the prefix, so the token emitted at each accepted node is a sample
of the target's own distribution there; whether it was drafted only decides if the walk continues. The acceptance
probability equals that of EAGLE-2's rejection, sibling by sibling: the target probabilities of the children, summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle.decode.tree import DraftTree

NO_TOKEN = -1
"""The choice at a node where the target's output is NaN. No draft token equals it, so nothing is accepted below."""


class Accepted(NamedTuple):
    """``path``: node indices from the root to the last accepted node, root included; ``tokens``: ids that this cycle
    adds after the root: the accepted drafted ones, then the bonus token. ``len(tokens) == len(path)``."""

    path: list[int]
    tokens: list[int]


def accept_all_at_once(trees: Sequence[DraftTree], chosen: Sequence[Tensor]) -> list[Accepted]:
    """Acceptance from the target's choice at every node. ``chosen``: [N] for each tree. One copy to the host, no loop
    over nodes.

    Worked example: tokens R a b c e, parents -1 0 0 1 2, chosen at the nodes a c e x y: a is chosen at R, c at a, so
    the path is R a c; the choice at c is x: the cycle adds a c x.
    """
    marked = [
        torch.stack([accepted_nodes(tree, choice).long(), tree.tokens, choice])  # [3, N]
        for tree, choice in zip(trees, chosen, strict=True)
    ]
    host, start, found = torch.cat(marked, dim=1).cpu().numpy(), 0, []
    for tree in trees:
        accepted, tokens, choices = host[:, start : start + tree.size]
        path = accepted.nonzero()[0].tolist()  # parents precede children, so ascending index is ascending depth
        found.append(Accepted(path, [*tokens[path[1:]].tolist(), int(choices[path[-1]])]))
        start += tree.size
    return found


def accepted_nodes(tree: DraftTree, chosen: Tensor) -> Tensor:
    """Which nodes are accepted, [..., N] bool, if the target's choices at the nodes are ``chosen`` [..., N]. One
    tree for all, or one for each."""
    above = tree.parents.clamp(min=0).expand_as(chosen)
    match = tree.tokens == chosen.gather(-1, above)  # [..., N]
    match[..., 0] = True  # the root is already part of the answer
    return ~(tree.mask & ~match.unsqueeze(-2)).any(dim=-1)


def accept_step_by_step(tree: DraftTree, choose: Callable[[int, list[int]], int]) -> Accepted:
    """Acceptance where the target's choice at a node depends on the tokens before it (repetition penalty and such).

    Args:
        choose: called with a node index and the new tokens that lead to it (root not included), returns the choice.
            Called for the nodes of the accepted path only.
    """
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    children = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    path: list[int] = [0]
    added: list[int] = []
    while True:
        added.append(choose(path[-1], added))
        child = children.get((path[-1], added[-1]))
        if child is None:
            return Accepted(path, added)
        path.append(child)

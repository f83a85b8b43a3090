"""The draft tree as pure tensor functions: expand a level, choose the frontier, select nodes, build the mask.

Nothing here knows a model or a device. A tree has ``N`` nodes in the order in which they were drafted, so a parent
always precedes its children; node 0 is the root, the newest accepted token. EAGLE-2 (arXiv 2406.16858):
a node's score is the sum of draft log-probabilities along its path.

Worked example, ``top_k`` 2, ``depth`` 1, ``total_tokens`` 5::

    root R ─┬─ a (-0.1) ─┬─ c (-0.3)      candidates in draft order: a b c d e f
            │            └─ d (-2.0)      four best by score:        a b c e
            └─ b (-0.5) ─┬─ e (-0.9)      nodes:   R  a  b  c  e
                         └─ f (-3.0)      parents: -1 0  0  1  2
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DraftTree(NamedTuple):
    """``tokens`` [N] ids; ``parents`` [N] node indices, -1 at the root; ``depths`` [N], root 0; ``mask`` [N, N] bool,
    row i true at node i and its ancestors; ``scores`` [N] cumulative draft log-probability, root 0. Trees of equal size
    may be joined: [B, N] and [B, N, N]."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    mask: Tensor
    scores: Tensor

    @property
    def size(self) -> int:
        return self.tokens.shape[-1]


class Candidates(NamedTuple):
    """Drafted nodes without the root: ``tokens`` [M], ``scores`` [M], ``parents`` [M] candidate indices, -1 = root.
    A batch of sequences has [B, M] each."""

    tokens: Tensor
    scores: Tensor
    parents: Tensor

    def of(self, row: int) -> Candidates:
        """The candidates of one sequence of a batch."""
        return Candidates(self.tokens[row], self.scores[row], self.parents[row])


def choose_frontier(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` best of the children just drafted, whose own children are drafted next.

    ``scores`` [..., F, k] cumulative → ``flat`` [..., f] indices into the flattened children, ``parent_rows`` [..., f]
    their row.
    """
    joined = scores.flatten(-2)  # [..., F * k]
    flat = joined.topk(min(top_k, joined.shape[-1])).indices  # [..., f]
    return flat, flat // scores.shape[-1]


def select_nodes(candidates: Candidates, root: Tensor, total_tokens: int, depth: int | None = None) -> DraftTree:
    """The root and the ``total_tokens - 1`` best candidates, kept in draft order.

    A child never scores above its parent and the sort is stable, so the parent of a selected node is selected too,
    also if scores are equal. ``depth``: the deepest level drafted, if known. Candidates of several sequences, with a
    ``root`` for each, give trees joined to one.
    """
    count = min(total_tokens - 1, candidates.tokens.shape[-1])
    order = torch.sort(candidates.scores, dim=-1, descending=True, stable=True).indices[..., :count]
    keep = order.sort(dim=-1).values  # [..., n]
    above = candidates.parents.gather(-1, keep)
    parents = torch.searchsorted(keep, above) + 1  # candidate index → node index
    parents = torch.where(above < 0, 0, parents)
    root = root.reshape(*parents.shape[:-1], 1)
    parents = torch.cat([torch.full_like(root, -1), parents], dim=-1)  # [..., N]
    mask = ancestor_mask(parents, depth)  # [..., N, N]
    scores = candidates.scores.gather(-1, keep)
    return DraftTree(
        tokens=torch.cat([root, candidates.tokens.gather(-1, keep)], dim=-1),
        parents=parents,
        depths=mask.sum(dim=-1) - 1,
        mask=mask,
        scores=torch.cat([torch.zeros_like(root, dtype=scores.dtype), scores], dim=-1),
    )


def prune(tree: DraftTree, total_tokens: int) -> DraftTree:
    """The root and the ``total_tokens - 1`` best nodes of a tree, in its order; their parents are among them, since no
    child scores above its parent."""
    order = torch.sort(tree.scores[1:], descending=True, stable=True).indices[: total_tokens - 1] + 1
    keep = torch.cat([order.new_zeros(1), order]).sort().values  # [n]
    parents = torch.searchsorted(keep, tree.parents[keep])
    parents[0] = -1
    return DraftTree(tree.tokens[keep], parents, tree.depths[keep], tree.mask[keep][:, keep], tree.scores[keep])


def root_only(root: Tensor) -> DraftTree:
    """A tree of the root [1] alone: verifying it is one step of plain decoding."""
    zero = torch.zeros(1, dtype=torch.long, device=root.device)
    return DraftTree(root.reshape(1), zero - 1, zero, zero.reshape(1, 1) == 0, zero.float())


def ancestor_mask(parents: Tensor, depth: int | None = None) -> Tensor:
    """``parents`` [..., N] (-1 at the root) → [..., N, N] bool, row i true at i and at each of its ancestors.

    By doubling: after r rounds a row reaches 2^r generations up, so a tree of depth d takes log2(d) rounds.
    ``depth`` bounds the tree's depth; without it the number of nodes does.

    >>> ancestor_mask(torch.tensor([-1, 0, 0, 1])).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """
    size = parents.shape[-1]
    reach = torch.eye(size, device=parents.device).expand(*parents.shape, size)  # [..., N, N]
    reach = reach.scatter(-1, parents.clamp(min=0).unsqueeze(-1), 1.0)  # the root points at itself
    for _ in range((size - 1 if depth is None else depth).bit_length()):
        reach = (reach @ reach).clamp_(max=1.0)
    return reach > 0


def leaf_paths(tree: DraftTree) -> Tensor:
    """Paths from the root to each leaf, [leaves, deepest + 1] node indices padded with -1, leaves in node order.

    For inspection and tests; decoding does not need it.
    """
    is_parent = torch.zeros(tree.size, dtype=torch.bool)
    is_parent[tree.parents[1:].cpu()] = True
    leaves = torch.nonzero(~is_parent).flatten()
    paths = torch.full((len(leaves), int(tree.depths.max()) + 1), -1)
    for row, leaf in enumerate(leaves.tolist()):
        nodes = torch.nonzero(tree.mask[leaf].cpu()).flatten()
        paths[row, : len(nodes)] = nodes
    return paths

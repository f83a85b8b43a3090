"""Random trees against a slow reference that walks parents one by one."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle.decode.accept import accept_all_at_once, accept_step_by_step
from eagle.decode.masks import MaskBuffer
from eagle.decode.tree import Candidates, DraftTree, select_nodes
from eagle.kv_cache import KVCache

TREES = 200
CPU = torch.device("cpu")


@st.composite
def candidates(draw: Any) -> Candidates:
    """Drafted nodes in draft order with scores that never rise from parent to child; ties are common. Children of one
    parent have different tokens, as top-k gives."""
    count = draw(st.integers(1, 24))
    parents, scores, tokens = [], [], []
    for node in range(count):
        parent = draw(st.integers(-1, node - 1))
        taken = {tokens[other] for other in range(node) if parents[other] == parent}
        parents.append(parent)
        tokens.append(draw(st.integers(0, 40).filter(lambda token, taken=taken: token not in taken)))
        scores.append((scores[parent] if parent >= 0 else 0.0) - draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])))
    return Candidates(torch.tensor(tokens), torch.tensor(scores), torch.tensor(parents))


def ancestors(parents: list[int], node: int) -> list[int]:
    """The node and all above it, root first."""
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def slow_accept(tree: DraftTree, chosen: list[int]) -> tuple[list[int], list[int]]:
    """Walks from the root to the child that the target chose, as long as there is one."""
    tokens, parents, path = tree.tokens.tolist(), tree.parents.tolist(), [0]
    while True:
        below = [n for n in range(tree.size) if parents[n] == path[-1] and tokens[n] == chosen[path[-1]]]
        if not below:
            return path, [*(tokens[n] for n in path[1:]), chosen[path[-1]]]
        path.append(below[0])


@settings(max_examples=TREES, deadline=None)
@given(drafted=candidates(), total=st.integers(1, 26), past=st.integers(0, 5), data=st.data())
def test_tree_mask_positions_path_and_kept_rows(drafted: Candidates, total: int, past: int, data: Any) -> None:
    tree = select_nodes(drafted, torch.tensor([99]), total)
    parents = tree.parents.tolist()

    # nodes: the best by score, each with its parent before it
    assert tree.size == min(total, drafted.tokens.shape[0] + 1)
    assert all(parents[node] < node for node in range(tree.size))
    kept = sorted(tree.scores[1:].tolist(), reverse=True)
    assert kept == sorted(drafted.scores.tolist(), reverse=True)[: tree.size - 1]

    # mask and positions: a node sees its ancestors and stands as deep as there are
    for node in range(tree.size):
        path = ancestors(parents, node)
        assert tree.mask[node].nonzero().flatten().tolist() == sorted(path)
        assert int(tree.depths[node]) == len(path) - 1
    window = MaskBuffer(32, 40, torch.float32, CPU).window([past], tree.mask[None])
    assert torch.equal(window[0, 0, :, :past], torch.zeros(tree.size, past))
    assert torch.equal(window[0, 0, :, past:] == 0, tree.mask)

    # acceptance: both ways are the slow walk; choices follow the tree more often than chance
    choice = st.one_of(st.sampled_from(tree.tokens.tolist()), st.integers(0, 40))
    chosen = [data.draw(choice) for _ in range(tree.size)]
    path, tokens = slow_accept(tree, chosen)
    assert accept_all_at_once([tree], [torch.tensor(chosen)]) == [(path, tokens)]
    assert accept_step_by_step(tree, lambda node, _: chosen[node]) == (path, tokens)

    # cache: what is kept is the past and the path, in order
    cache = KVCache.allocate([CPU], 1, [(1, 1)], past + tree.size, torch.float32)
    rows = torch.arange(past + tree.size).float().view(1, 1, -1, 1)
    cache.update(rows, -rows, 0)
    cache.keep([past], [path])
    wanted = [*range(past), *(past + node for node in path)]
    assert cache.layers[0].store_k[0, 0, : cache.length, 0].tolist() == wanted
    assert cache.layers[0].store_v[0, 0, : cache.length, 0].tolist() == [-row for row in wanted]

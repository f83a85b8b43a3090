"""What a cycle leaves out must change nothing: rows, copies and repeated heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_llava_hf
from torch.utils._python_dispatch import TorchDispatchMode

from eagle import MSDModel
from eagle.decode.decoder import Decoder, on_host, scores_of_tree
from eagle.decode.masks import batch_mask
from eagle.decode.tree import Candidates, select_nodes
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import load_target
from eagle.kv_cache import KVCache

HEADS, SIZE, ROWS = 4, 32, 9


def draft(kv_heads: int) -> DraftModel:
    torch.manual_seed(kv_heads)
    config = DraftConfig(
        model_type="qwen2_vl", hidden_size=SIZE, intermediate_size=48, num_attention_heads=HEADS,
        num_key_value_heads=kv_heads, vocab_size=64, head_dim=SIZE // HEADS, input_layernorm=True,
    )  # fmt: skip
    return DraftModel(config).eval()


def cache_for(model: DraftModel, batch: int) -> KVCache:
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    return KVCache.allocate([torch.device("cpu")], batch, [(heads, width)], 32, torch.float32)


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@torch.no_grad()
def test_the_last_row_of_a_prompt_alone(kv_heads: int) -> None:
    """Same hidden state, and the cache has all rows."""
    model, x, positions = draft(kv_heads), torch.randn(1, ROWS, SIZE), torch.arange(ROWS).unsqueeze(0)
    whole, short = cache_for(model, 1), cache_for(model, 1)
    every = model(x, positions, cache=whole)
    last = model(x, positions, cache=short, last_only=True)
    assert last.shape == (1, 1, SIZE)
    torch.testing.assert_close(last, every[:, -1:], atol=1e-5, rtol=0)
    assert short.lengths == [ROWS]
    assert torch.equal(short.layers[0].store_k, whole.layers[0].store_k)
    assert torch.equal(short.layers[0].store_v, whole.layers[0].store_v)


@pytest.mark.parametrize("kv_heads", [2, 1])
@torch.no_grad()
def test_heads_of_a_group_see_what_their_row_may_see(kv_heads: int) -> None:
    """Three rows after a cached prefix, for two sequences, against one causal forward without a cache."""
    model, x, positions = draft(kv_heads), torch.randn(2, ROWS, SIZE), torch.arange(ROWS).unsqueeze(0)
    expected = model(x, positions)
    cache, prefix = cache_for(model, 2), ROWS - 3
    for row in range(2):
        part = cache.sequence(row)
        model(x[row : row + 1, :prefix], positions[:, :prefix], cache=part)
    cache.truncate([prefix, prefix])
    visible = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, -1, -1)
    mask = batch_mask([prefix, prefix], visible, torch.float32)
    got = model(x[:, prefix:], positions[:, prefix:], mask, cache)
    torch.testing.assert_close(got, expected[:, prefix:], atol=1e-5, rtol=0)


def test_scores_of_a_tree_are_known_on_the_host() -> None:
    """As `select_nodes` keeps them, equal scores included."""
    scores = torch.tensor([-0.1, -0.5, -0.5, -2.0, -0.9, -0.5])
    candidates = Candidates(torch.arange(6), scores, torch.tensor([-1, -1, -1, 0, 0, 1]))
    for size in range(1, 8):
        tree = select_nodes(candidates, torch.tensor([9]), size)
        assert np.array_equal(scores_of_tree(on_host(scores), size), on_host(tree.scores))


class Copies(TorchDispatchMode):
    """Counts what waits for a device: single values that are read, and whole tensors that go to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.values, self.tensors = 0, 0
        copy = torch.Tensor.cpu

        def counted(tensor: torch.Tensor) -> torch.Tensor:
            self.tensors += 1
            return copy(tensor)

        monkeypatch.setattr(torch.Tensor, "cpu", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.values += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_copy_to_the_host_a_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:  # fmt: skip
    """With a fixed tree; what `generate` prepares and the prompt come before."""
    base = make_llava_hf(tmp_path / "base")
    head = make_draft(tmp_path / "draft", load_target(base, dtype=torch.float32), agree=1.0)
    msd = MSDModel.from_pretrained(base, head, dtype=torch.float32, tree=TreeConfig(1, 60, 100))
    inputs, found = msd.target.prepare(msd.target.chat_prompt("How many?")), []
    for name in ("draft", "verify_within_memory", "accept", "commit"):
        part = getattr(Decoder, name)

        def counting(self: Decoder, *given: Any, part: Any = part) -> Any:
            with monkeypatch.context() as patch, Copies(patch) as copies:
                result = part(self, *given)
            found.append((copies.values, copies.tensors))
            return result

        monkeypatch.setattr(Decoder, name, counting)
    stats = msd.generate(**inputs, max_new_tokens=24, temperature=temperature, seed=1).stats
    assert stats.cycles > 3 and sum(stats.accept_lengths) > 0
    assert found[:4] == [(0, 0), (0, 0), (0, 1), (0, 0)]
    assert sum(values for values, _ in found) == 0 and sum(copies for _, copies in found) == stats.cycles

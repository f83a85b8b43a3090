"""The preallocated cache against plain concatenation and selection."""

import pytest
import torch
from transformers import DynamicCache

from eagle import kv_cache
from eagle.kv_cache import CacheStorage, KVCache

CPU = torch.device("cpu")


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 2, count, 4, generator=torch.Generator().manual_seed(seed))


def test_append_and_keep_equal_concatenation():
    cache = KVCache.allocate([CPU, CPU], 1, [(2, 4)] * 2, capacity=16, dtype=torch.float32)
    past, drafted = rows(3, 0), rows(5, 1)
    for layer in range(2):
        cache.update(past + layer, past - layer, layer)
        keys, values = cache.update(drafted + layer, drafted - layer, layer)
        assert torch.equal(keys, torch.cat([past, drafted], 2) + layer)
        assert torch.equal(values, torch.cat([past, drafted], 2) - layer)
    cache.keep([3], [[0, 2, 4]])
    assert cache.length == cache.get_seq_length() == 6
    kept = torch.cat([past, drafted[:, :, [0, 2, 4]]], 2)
    more = rows(1, 2)
    for layer in range(2):
        keys, values = cache.update(more, more, layer)
        assert torch.equal(keys[:, :, :6], kept + layer)
        assert torch.equal(values[:, :, :6], kept - layer)
        assert torch.equal(keys[:, :, 6:], more)


def test_a_prefix_is_kept_without_copying():
    cache = KVCache.allocate([CPU], 1, [(2, 4)], capacity=8, dtype=torch.float32)
    cache.update(rows(6, 0), rows(6, 1), 0)
    before = cache.layers[0].store_k.clone()
    cache.keep([2], [[0, 1]])
    assert cache.length == 4
    assert torch.equal(cache.layers[0].store_k, before)


def test_full_cache_says_so():
    cache = KVCache.allocate([CPU], 1, [(2, 4)], capacity=4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="holds 4 rows, 5 are needed"):
        cache.update(rows(5, 0), rows(5, 0), 0)


def test_works_inside_stock_generate(tiny_llama):
    model, prompt = tiny_llama
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, past_key_values=DynamicCache())
    config = model.config
    cache = KVCache.allocate(
        [CPU] * config.num_hidden_layers,
        1,
        [(config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers,
        64,
        torch.float32,
    )
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False, past_key_values=cache), expected)


def test_sequences_of_different_length_equal_caches_of_their_own():
    """Each sequence of a batch keeps its own rows, whatever the others accept."""
    cache = KVCache.allocate([CPU, CPU], 3, [(2, 4)] * 2, capacity=32, dtype=torch.float32)
    alone = [KVCache.allocate([CPU, CPU], 1, [(2, 4)] * 2, capacity=32, dtype=torch.float32) for _ in range(3)]
    lengths = [5, 2, 7]
    for row, length in enumerate(lengths):
        for layer in range(2):
            cache.sequence(row).update(rows(length, 10 * row + layer), rows(length, 10 * row + layer), layer)
            alone[row].update(rows(length, 10 * row + layer), rows(length, 10 * row + layer), layer)
    cache.truncate(lengths)
    for turn, paths in enumerate(([[0], [0, 2, 3], [0, 1]], [[0, 3], [0], [0, 1, 2, 3]])):
        bases = cache.lengths
        for layer in range(2):
            drafted = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(100 + 10 * turn + layer))
            keys, _ = cache.update(drafted, -drafted, layer)
            for row in range(3):
                own, _ = alone[row].update(drafted[row : row + 1], -drafted[row : row + 1], layer)
                assert torch.equal(keys[row : row + 1, :, : own.shape[2]], own)
        cache.keep(bases, paths)
        for row in range(3):
            alone[row].keep([bases[row]], [paths[row]])
    assert cache.lengths == [8, 6, 13] == [each.length for each in alone]
    storage = cache.layers[0].store_k.data_ptr()
    kept = cache.select([0, 2])
    assert kept.lengths == [8, 13]
    assert torch.equal(kept.layers[1].store_v[1, :, :13], alone[2].layers[1].store_v[0, :, :13])
    assert torch.equal(kept.layers[0].store_k[0, :, :8], alone[0].layers[0].store_k[0, :, :8])
    assert kept.layers[0].store_k.shape[0] == 2 and kept.layers[0].store_k.data_ptr() == storage, "it was copied"
    with pytest.raises(ValueError, match="ascending"):
        kept.select([1, 0])


def test_layers_with_keys_of_other_shapes():
    """Each layer keeps the rows of its own shape; one without heads has none."""
    shapes = [(2, 4), (1, 8), (2, 4), (0, 4)]
    cache = KVCache.allocate([CPU] * 4, 1, shapes, capacity=8, dtype=torch.float32)
    rows = [torch.randn(1, heads, 5, size) for heads, size in shapes]
    for layer in range(3):
        cache.update(rows[layer], -rows[layer], layer)
    cache.keep([2], [[0, 2]])
    assert cache.length == 4
    for layer in range(3):
        keys, values = cache.update(rows[layer][:, :, :1], rows[layer][:, :, :1], layer)
        assert torch.equal(keys[:, :, :4], rows[layer][:, :, [0, 1, 2, 4]])
        assert torch.equal(values[:, :, :4], -rows[layer][:, :, [0, 1, 2, 4]])


def test_a_growth_that_fails_can_be_tried_again(monkeypatch):
    """Layers that have grown before memory ran out do not make the cache larger."""
    shapes = [(2, 4), (1, 8)]
    cache = KVCache.allocate([CPU] * 2, 1, shapes, capacity=8, dtype=torch.float32)
    rows = [torch.randn(1, heads, 5, size) for heads, size in shapes]
    for layer in range(2):
        cache.update(rows[layer], -rows[layer], layer)
    made = []

    def first_alone(*parts):
        if made:
            raise MemoryError
        made.append(CacheStorage(*parts))
        return made[0]

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(kv_cache, "CacheStorage", first_alone)
        cache.grow(9)
    assert cache.capacity == 8 == KVCache(cache._stores, cache._groups, cache.lengths).capacity
    cache.grow(9)
    assert cache.capacity >= 9
    for layer in range(2):
        keys, values = cache.update(rows[layer], rows[layer], layer)
        assert torch.equal(keys, rows[layer].repeat(1, 1, 2, 1))
        assert torch.equal(values[:, :, :5], -rows[layer])

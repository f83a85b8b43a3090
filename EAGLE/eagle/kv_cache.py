"""Preallocated KV cache: rows are appended and kept in place; the whole cache is never copied.

It is a `transformers.Cache`, so every transformers model can fill it. All layers on one device that have keys of one
shape share one tensor, so keeping a path takes two copies instead of two for each layer.

Sequences of a batch have different lengths: each has its own rows from 0, without gaps, and appends after its own last
row. Columns past the end of a sequence have old values; the attention mask excludes them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 256
"""Rows of a cache on an accelerator, and of one that has grown, are a multiple of this."""


class CacheStorage(NamedTuple):
    """A group of layers: ``keys``, ``values`` [layers, B, heads, capacity, head_dim]."""

    keys: Tensor
    values: Tensor


class RowIndices:
    """Where the next rows of each sequence go. The same for all layers, so computed once in a forward."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._places: tuple[Tensor, Tensor]

    def places(self, lengths: Sequence[int], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices (sequence [B, 1], column [B, count]) of the ``count`` rows after ``lengths``."""
        key = (*lengths, count, device)
        if key != self._key:
            start = torch.tensor(lengths, device=device).unsqueeze(1)  # [B, 1]
            sequences = torch.arange(len(lengths), device=device).unsqueeze(1)
            self._key, self._places = key, (sequences, start + torch.arange(count, device=device))
        return self._places


class CacheLayer(CacheLayerMixin):
    """One layer's view of the shared storage. ``store_k``, ``store_v`` [B, heads, capacity, head_dim]. ``lengths``:
    rows in use of each sequence."""

    is_sliding = False
    is_compileable = False

    def __init__(self, store_k: Tensor, store_v: Tensor, lengths: Sequence[int], indices: RowIndices) -> None:
        super().__init__()
        self.store_k, self.store_v, self.lengths, self._indices = store_k, store_v, list(lengths), indices
        self.is_initialized = True
        self.dtype, self.device = store_k.dtype, store_k.device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage is preallocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends ``n`` rows [B, heads, n, head_dim] to each sequence; returns all columns in use, as views."""
        count = key_states.shape[-2]
        first, end = self.lengths[0], max(self.lengths) + count
        if end > self.store_k.shape[-2]:
            raise RuntimeError(f"KV cache holds {self.store_k.shape[-2]} rows, {end} are needed")
        if all(length == first for length in self.lengths):
            self.store_k[:, :, first:end].copy_(key_states)
            self.store_v[:, :, first:end].copy_(value_states)
        else:
            sequences, columns = self._indices.places(self.lengths, count, self.device)
            self.store_k[sequences, :, columns] = key_states.transpose(1, 2)
            self.store_v[sequences, :, columns] = value_states.transpose(1, 2)
        self.lengths = [length + count for length in self.lengths]
        return self.store_k[:, :, :end], self.store_v[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_seq_length(self) -> int:
        return max(self.lengths)

    def get_max_length(self) -> int:
        return self.store_k.shape[-2]

    def get_max_cache_shape(self) -> int:
        return self.store_k.shape[-2]


class KVCache(Cache):
    """All layers of one model.

    Args:
        stores: storage of each group of layers.
        groups: the group of each layer, in order.
        lengths: rows in use of each sequence.
        states: of layers that have a state instead of rows (`eagle.recurrent_state.StateLayer`), by layer.
    """

    def __init__(
        self,
        stores: Mapping[Any, CacheStorage],
        groups: Sequence[Hashable],
        lengths: Sequence[int],
        states: Mapping[int, Any] | None = None,
    ) -> None:
        self._stores, self._groups, self._states = dict(stores), list(groups), dict(states or {})
        layer_views: dict[int, Any] = dict(self._states)
        for group, (keys, values) in stores.items():
            indices = RowIndices()
            views = {index: CacheLayer(keys[i], values[i], lengths, indices) for i, index in self._layers_of(group)}
            layer_views.update(views)
        super().__init__(layers=[layer_views[index] for index in range(len(groups))])
        self._rows = [layer for index, layer in enumerate(self.layers) if index not in self._states]
        self.capacity = min(store.keys.shape[3] for store in stores.values())  # a growth may have failed

    def _layers_of(self, group: Hashable) -> Iterator[tuple[int, int]]:
        """Index in the group's storage and in the model of each of its layers."""
        return enumerate(i for i, own in enumerate(self._groups) if own == group and i not in self._states)

    @classmethod
    def allocate(
        cls,
        devices: Sequence[torch.device],
        batch: int,
        shapes: Sequence[tuple[int, int]],
        capacity: int,
        dtype: torch.dtype,
        states: Mapping[int, Any] | None = None,
    ) -> KVCache:
        """An empty cache.

        Args:
            devices: the device of each layer, in order.
            batch: sequences.
            shapes: heads of keys and values, and the size of each, by layer. No heads for a layer without own rows.
            capacity: rows (positions) of each sequence, with tree nodes. Rounded up on an accelerator, so the next
                request can use the same memory again.
            states: as for the class.
        """
        stores = {}
        groups = list(zip(devices, shapes, strict=True))
        if any(device.type != "cpu" for device in devices):
            capacity = -(-capacity // BLOCK) * BLOCK
        for group in dict.fromkeys(groups):
            device, (heads, head_dim) = group
            layers = sum(own == group and index not in (states or {}) for index, own in enumerate(groups))
            shape = (layers, batch, heads, capacity, head_dim)
            stores[group] = CacheStorage(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
        return cls(stores, groups, [0] * batch, states)

    @property
    def lengths(self) -> list[int]:
        """Rows in use of each sequence."""
        return self._rows[0].lengths

    @property
    def length(self) -> int:
        """Rows in use of the longest sequence."""
        return max(self.lengths)

    def grow(self, capacity: int) -> None:
        """Makes room for ``capacity`` rows of each sequence. Rows in use are copied. If memory runs out, some layers
        may have grown, but not the capacity."""
        if capacity <= self.capacity:
            return
        used, rows = self.length, -(-capacity // BLOCK) * BLOCK
        for group, old in self._stores.items():
            store = CacheStorage(*(part.new_zeros(*part.shape[:3], rows, part.shape[4]) for part in old))
            for new, part in zip(store, old, strict=True):
                new[:, :, :, :used] = part[:, :, :, :used]
            self._stores[group] = store
            for own, index in self._layers_of(group):
                self.layers[index].store_k, self.layers[index].store_v = store.keys[own], store.values[own]
        self.capacity = rows

    def truncate(self, lengths: Sequence[int]) -> None:
        """Removes all rows from ``lengths[b]`` on from sequence ``b``, and drafted tokens from states."""
        for layer in self._rows:
            layer.lengths = list(lengths)
        for state in self._states.values():
            state.discard()

    def keep(self, bases: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Of the rows of sequence b from ``bases[b]`` on, keeps ``bases[b] + paths[b][i]`` as row ``bases[b] + i`` and
        removes the others.

        A path ascends and starts at 0 (the root is always kept). Rows that do not move are not copied.
        """
        for state in self._states.values():
            state.keep([len(path) for path in paths])
        for number, (base, path) in enumerate(zip(bases, paths, strict=True)):
            first = next((i for i, node in enumerate(path) if node != i), len(path))
            if first == len(path):
                continue
            for stores in self._stores.values():
                index = torch.tensor([base + node for node in path[first:]], device=stores.keys.device)
                for store in stores:
                    store[:, number, :, base + first : base + len(path)] = store[:, number].index_select(2, index)
        self.truncate([base + len(path) for base, path in zip(bases, paths, strict=True)])

    def sequence(self, number: int) -> KVCache:
        """One sequence as a cache of its own, on the same storage. Its lengths are not written back to this cache."""
        states = {index: state.sequence(number) for index, state in self._states.items()}
        return KVCache(self._part(number, number + 1), self._groups, self.lengths[number : number + 1], states)

    def _part(self, start: int, end: int) -> dict[Any, CacheStorage]:
        """The storage of sequences from ``start`` to before ``end``."""
        return {group: CacheStorage(*(part[:, start:end] for part in store)) for group, store in self._stores.items()}

    def select(self, numbers: Sequence[int]) -> KVCache:
        """A cache of the given sequences, in ascending order, on the same storage. Only the rows in use of sequences
        that move are copied. This cache must not be used any more."""
        lengths = self._move_to_front(numbers)
        states = {index: state.select(numbers) for index, state in self._states.items()}
        return KVCache(self._part(0, len(lengths)), self._groups, lengths, states)

    def _move_to_front(self, numbers: Sequence[int]) -> list[int]:
        """Copies the rows of the given sequences to the first places. Returns their lengths."""
        kept = list(numbers)
        if kept != sorted(set(kept)):
            raise ValueError(f"sequences {kept} are not in ascending order")
        for store in (part for stores in self._stores.values() for part in stores):
            for place, number in enumerate(kept):
                if place != number:
                    length = self.lengths[number]
                    store[:, place, :, :length] = store[:, number, :, :length]
        return [self.lengths[number] for number in kept]

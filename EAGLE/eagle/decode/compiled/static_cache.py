"""A KV cache for compiled forwards, which are compiled once for all its sizes.

`KVCache` returns as many columns as are in use: a new shape with every token. Here rows are written at places given by
a tensor, and the number of columns of a forward grows in steps (`bucket`), so that few CUDA graphs are recorded. The
mask excludes columns that are not in use. These hold zeros or rows of earlier requests, so they are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagle.kv_cache import CacheLayer, CacheStorage, KVCache, RowIndices

STEP = 256
"""Step by which the columns of short forwards grow."""
SMALLEST = 1024
"""Columns of the smallest cache."""
SPARE = 16
"""Rows of a cache that are never used. So no forward sees all rows: torch would compile equal sizes as one."""


def bucket(columns: int) -> int:
    """Columns that a forward sees when ``columns`` are in use: a multiple of `STEP`, or of a quarter of the next lower
    power of two if that is larger. So at most a quarter more than needed is read.

    >>> [bucket(n) for n in (1, 256, 257, 1024, 1025, 2049, 8000)]
    [256, 256, 512, 1024, 1280, 2560, 8192]
    """
    step = max(STEP, (1 << max(columns - 1, 1).bit_length() - 1) // 4)
    return -(-columns // step) * step


def rounded(capacity: int) -> int:
    """Rows of a cache for ``capacity``: a power of two."""
    return max(SMALLEST, 1 << (capacity - 1).bit_length())


def buckets(capacity: int) -> list[int]:
    """All values of `bucket` up to ``capacity``, ascending."""
    return sorted({bucket(columns) for columns in range(STEP, capacity + 1, STEP)})


def dynamic(tensor: Tensor, *dims: int) -> Tensor:
    """Marks sizes that change from call to call, so that a compiled function takes any. A size of 1 is left as it is:
    torch compiles it as a constant."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


class Window:
    """Where the next forward writes and reads, the same for all layers. ``places``: [n] columns to write. ``columns``:
    [columns], of which only the size is used: the number of columns to read. A number would be compiled as a
    constant."""

    def __init__(self) -> None:
        self.places = torch.zeros(0, dtype=torch.long)
        self.columns = torch.zeros(0)


class StaticLayer(CacheLayer):
    """One layer of a `StaticCache`."""

    def __init__(self, store_k: Tensor, store_v: Tensor, window: Window) -> None:
        super().__init__(store_k, store_v, [0], RowIndices())
        self._window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes rows [1, heads, n, head_dim] at the window's places; returns its columns."""
        return self.write(self._window.places, key_states, value_states)

    def write(self, places: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`update` at ``places`` [n]."""
        columns = self._window.columns.shape[0]
        self.store_k.index_copy_(2, places, keys)
        self.store_v.index_copy_(2, places, values)
        return self.store_k[:, :, :columns], self.store_v[:, :, :columns]


class StaticCache(KVCache):
    """All layers of one model on one device, for one sequence. Prefill goes through `sequence`, with shapes of its own.

    Args:
        shapes: heads of keys and values, and the size of each, by layer.
        capacity: rows; rounded up to a power of two.
        move: `move_rows`, compiled.
        static_addresses: CUDA graphs read and write the storage in place.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        move: Callable[[StaticCache, Tensor], None],
        static_addresses: bool = False,
    ) -> None:
        rows = rounded(capacity)
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        stores = {
            layer: CacheStorage(*(zeros(1, 1, heads, rows + SPARE, head_dim) for _ in range(2)))
            for layer, (heads, head_dim) in enumerate(shapes)
        }  # separate, as a graph writes into each
        super().__init__(stores, range(len(shapes)), [0])
        self.window, self._move, self._device, self._static_addresses = Window(), move, device, static_addresses
        self.layers = [StaticLayer(store.keys[0], store.values[0], self.window) for store in stores.values()]
        self._mark(rows)

    def _mark(self, rows: int) -> None:
        """Tells torch about storage of ``rows`` rows. Without a guard on addresses another storage is recorded, but not
        compiled."""
        self.capacity, self._columns = rows, torch.empty(rows, device=self._device)
        for store in (part for layer in self.layers for part in (layer.store_k, layer.store_v)):
            dynamic(store, 2)
            if self._static_addresses:
                torch._dynamo.mark_static_address(store, guard=False)

    def grow(self, capacity: int) -> None:
        if capacity > self.capacity:
            rows = rounded(capacity)
            super().grow(rows + SPARE)
            self._mark(rows)

    def clear(self) -> None:
        """Sets all rows to zero."""
        for layer in self.layers:
            layer.store_k.zero_()
            layer.store_v.zero_()

    def open(self, count: int) -> int:
        """Sets the window to the next ``count`` rows. Returns the number of columns that the forward sees."""
        start = self.length
        columns = bucket(start + count)
        self.window.places = dynamic(torch.arange(start, start + count, device=self._device), 0)
        self.set_columns(columns)
        return columns

    def set_columns(self, columns: int) -> None:
        """Sets the number of columns that the next forwards see."""
        if self.window.columns.shape[0] != columns:
            self.window.columns = dynamic(self._columns[:columns], 0)

    def close(self, count: int) -> None:
        """Ends a forward: the first ``count`` rows of the window are now in use."""
        self.truncate([self.length + count])

    def keep(self, bases: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """`KVCache.keep` for the rows of the last window, in one compiled step."""
        (base,), (path,) = bases, paths
        if list(path) != list(range(len(path))):
            order = [*path, *range(len(path), len(self.window.places))]
            self._move(self, dynamic(torch.tensor(order, device=self._device) + base, 0))
        self.truncate([base + len(path)])


def move_rows(cache: StaticCache, source: Tensor) -> None:
    """Copies columns ``source`` [n] of every layer to the places of the last window."""
    for layer in cache.layers:
        for store in (layer.store_k, layer.store_v):
            store.index_copy_(2, cache.window.places, store.index_select(2, source))

"""A KV cache for compiled forwards, which are compiled once for all its sizes.

`KVCache` returns as many columns as are in use: a new shape with every token. Here rows are written at places given by
a tensor, and the number of columns of a forward grows in steps (`bucket`), so that few CUDA graphs are recorded. The
mask excludes columns that are not in use. These hold zeros or rows of earlier requests, so they are finite.

Each sequence of a batch has a slot. With CUDA graphs a forward computes a power of two of slots, so that few graphs are
recorded; what slots without a sequence give is ignored. When a sequence ends, the others move to the first slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


def padded_slots(sequences: int) -> int:
    """Slots of a forward of so many sequences with CUDA graphs: a power of two.

    >>> [padded_slots(n) for n in (1, 2, 3, 8, 9)]
    [1, 2, 4, 8, 16]
    """
    return 1 << (sequences - 1).bit_length()


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


def padded(values: Tensor, *sizes: int) -> Tensor:
    """Appends zeros until the first dimensions have these ``sizes``, which are marked as dynamic."""
    missing = [size - own for size, own in zip(sizes, values.shape, strict=False)]
    if any(missing):
        pads = [(0, 0)] * (values.dim() - len(sizes)) + [(0, count) for count in reversed(missing)]
        values = F.pad(values, [count for pair in pads for count in pair])
    values = values.contiguous()
    return dynamic(values.view(-1).view(values.shape), *range(len(sizes)))  # torch compares strides of size 1 too


class Window:
    """Where the next forward writes and reads, the same for all layers. ``slots``: [S, 1] their indices. ``places``:
    [S, n] columns to write. ``columns``: [columns], of which only the size is used: the number of columns to read. A
    number would be compiled as a constant."""

    def __init__(self) -> None:
        self.slots = torch.zeros(0, 1, dtype=torch.long)
        self.places = torch.zeros(0, 0, dtype=torch.long)
        self.columns = torch.zeros(0)


class StaticLayer(CacheLayer):
    """One layer of a `StaticCache`."""

    def __init__(self, store_k: Tensor, store_v: Tensor, window: Window) -> None:
        super().__init__(store_k, store_v, [0], RowIndices())
        self._window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes rows [S, heads, n, head_dim] at the window's places; returns its columns."""
        return self.write(self._window.places, key_states, value_states)

    def write(self, places: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`update` at ``places`` [S, n]."""
        slots, columns = self._window.slots, self._window.columns.shape[0]
        self.store_k[slots, :, places] = keys.transpose(1, 2)
        self.store_v[slots, :, places] = values.transpose(1, 2)
        return self.store_k[:, :, :columns], self.store_v[:, :, :columns]


class StaticCache(KVCache):
    """All layers of one model on one device. Prefill goes through `sequence`, with shapes of its own.

    Args:
        shapes: heads of keys and values, and the size of each, by layer.
        capacity: rows of each sequence; rounded up to a power of two.
        move: `move_rows`, compiled.
        static_addresses: CUDA graphs read and write the storage in place.
        sequences: that there is room for.

    Attributes:
        room: slots; ``slots``: those that forwards compute, 0 if a growth failed: such a cache serves no forward.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        move: Callable[[StaticCache, Tensor], None],
        static_addresses: bool = False,
        sequences: int = 1,
    ) -> None:
        rows, self._pad_slots = rounded(capacity), static_addresses
        self.room = self._slots_for(sequences)
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        stores = {
            layer: CacheStorage(*(zeros(1, self.room, heads, rows + SPARE, head_dim) for _ in range(2)))
            for layer, (heads, head_dim) in enumerate(shapes)
        }  # separate, as a graph writes into each
        super().__init__(stores, range(len(shapes)), [0] * sequences)
        self.window, self._move, self._device, self._static_addresses = Window(), move, device, static_addresses
        self.layers = [StaticLayer(store.keys[0], store.values[0], self.window) for store in stores.values()]
        self._set_rows(rows)
        self.start(sequences)

    def _slots_for(self, sequences: int) -> int:
        return padded_slots(sequences) if self._pad_slots else sequences

    def _set_rows(self, rows: int) -> None:
        """The storage has been replaced, with so many rows."""
        self.capacity, self._columns, self.slots = rows, torch.empty(rows, device=self._device), 0

    def start(self, sequences: int) -> None:
        """Begins a request of so many sequences, without rows."""
        self._use([0] * sequences)

    def _use(self, lengths: Sequence[int]) -> None:
        """Takes the first slots for sequences of ``lengths`` rows, and tells torch about their storage. Without a guard
        on addresses another storage is recorded, but not compiled."""
        self.truncate(lengths)
        if (slots := self._slots_for(len(lengths))) == self.slots:
            return
        self.slots = slots
        self.window.slots = dynamic(torch.arange(self.slots, device=self._device).unsqueeze(1), 0)
        for layer, (keys, values) in zip(self.layers, self._stores.values(), strict=True):
            layer.store_k, layer.store_v = (dynamic(part[0, : self.slots], 0, 2) for part in (keys, values))
            if self._static_addresses:
                for store in (layer.store_k, layer.store_v):
                    torch._dynamo.mark_static_address(store, guard=False)

    def grow(self, capacity: int) -> None:
        if capacity > self.capacity:
            rows = rounded(capacity)
            self.slots = 0
            super().grow(rows + SPARE)
            self._set_rows(rows)
            self._use(self.lengths)

    def select(self, numbers: Sequence[int]) -> StaticCache:
        """This cache, with the given sequences in the first slots."""
        self._use(self._move_to_front(numbers))
        return self

    def growing(self) -> KVCache:
        """The same rows as a cache that is not static. This one must not be used any more."""
        lengths = self.lengths
        return KVCache(self._part(0, len(lengths)), self._groups, lengths)

    def clear(self) -> None:
        """Sets all rows to zero."""
        for store in self._stores.values():
            store.keys.zero_()
            store.values.zero_()

    def open(self, count: int) -> int:
        """Sets the window to the next ``count`` rows of each sequence. Returns the number of columns that the forward
        sees."""
        columns = bucket(self.length + count)
        if self.slots == 1:
            places = torch.arange(self.length, self.length + count, device=self._device).unsqueeze(0)
        else:
            starts = [*self.lengths, *[0] * (self.slots - len(self.lengths))]
            rows = torch.arange(count, device=self._device)
            places = torch.tensor(starts, device=self._device).unsqueeze(1) + rows
        self.window.places = dynamic(places, 0, 1)
        self.set_columns(columns)
        return columns

    def set_columns(self, columns: int) -> None:
        """Sets the number of columns that the next forwards see."""
        if self.window.columns.shape[0] != columns:
            self.window.columns = dynamic(self._columns[:columns], 0)

    def close(self, count: int) -> None:
        """Ends a forward: the first ``count`` rows of the window are now in use."""
        self.truncate([length + count for length in self.lengths])

    def keep(self, bases: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """`KVCache.keep` for the rows of the last window, in one compiled step."""
        if any(list(path) != list(range(len(path))) for path in paths):
            count = self.window.places.shape[1]
            order = [
                [base + node for node in (*path, *range(len(path), count))]
                for base, path in zip(bases, paths, strict=True)
            ]
            order += [list(range(count))] * (self.slots - len(order))
            self._move(self, dynamic(torch.tensor(order, device=self._device), 0, 1))
        self.truncate([base + len(path) for base, path in zip(bases, paths, strict=True)])


def move_rows(cache: StaticCache, source: Tensor, places: Tensor | None = None) -> None:
    """Copies columns ``source`` [S, n] of every layer to ``places`` [S, n]; by default to those of the last window."""
    slots = cache.window.slots
    places = cache.window.places if places is None else places
    for layer in cache.layers:
        for store in (layer.store_k, layer.store_v):
            store[slots, :, places] = store[slots, :, source]

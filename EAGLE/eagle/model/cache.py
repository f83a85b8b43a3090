"""Preallocated KV cache: append in place, keep the accepted rows in place, never re-select a whole cache.

It is a stock `transformers.Cache`, so every stock model class fills it. The storage of all layers on one device is one
tensor, so keeping a path costs two copies and not two a layer. Its size follows the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One layer's window on the shared storage. ``store_k``, ``store_v`` [B, heads, capacity, head_dim]."""

    is_sliding = False
    is_compileable = False

    def __init__(self, store_k: Tensor, store_v: Tensor) -> None:
        super().__init__()
        self.store_k, self.store_v = store_k, store_v
        self.length = 0
        self.is_initialized = True
        self.dtype, self.device = store_k.dtype, store_k.device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage exists from the start; nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends ``n`` rows [B, heads, n, head_dim]; returns all rows so far, as views."""
        end = self.length + key_states.shape[-2]
        if end > self.store_k.shape[-2]:
            raise RuntimeError(f"KV cache holds {self.store_k.shape[-2]} rows, {end} were asked for")
        self.store_k[:, :, self.length : end].copy_(key_states)
        self.store_v[:, :, self.length : end].copy_(value_states)
        self.length = end
        return self.store_k[:, :, :end], self.store_v[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.store_k.shape[-2]

    def get_max_cache_shape(self) -> int:
        return self.store_k.shape[-2]


class KVCache(Cache):
    """All layers of one model. ``capacity`` counts rows (positions), tree nodes included."""

    def __init__(
        self, devices: Sequence[torch.device], batch: int, heads: int, head_dim: int, capacity: int, dtype: torch.dtype
    ) -> None:
        """
        Args:
            devices: the device of each layer, in order.
            heads, head_dim: of the keys and values.
        """
        self._stores: list[tuple[Tensor, Tensor]] = []
        windows: dict[int, SlotLayer] = {}
        for device in dict.fromkeys(devices):
            layers = [index for index, where in enumerate(devices) if where == device]
            shape = (len(layers), batch, heads, capacity, head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self._stores.append((keys, values))
            windows.update({index: SlotLayer(keys[i], values[i]) for i, index in enumerate(layers)})
        super().__init__(layers=[windows[index] for index in range(len(devices))])
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Rows in use."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forgets all rows from ``length`` on."""
        for layer in self.layers:
            layer.length = length

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """Of the rows from ``base`` on, keeps ``base + rows[i]`` as row ``base + i`` and forgets the others.

        ``rows`` ascends and starts at 0 (the root is always kept). Rows that lie right already are not copied.
        """
        first = next((i for i, row in enumerate(rows) if row != i), len(rows))
        if first < len(rows):
            for keys, values in self._stores:
                index = torch.tensor([base + row for row in rows[first:]], device=keys.device)
                for store in (keys, values):
                    store[:, :, :, base + first : base + len(rows)] = store.index_select(3, index)
        self.truncate(base + len(rows))

"""Decoding with static shapes through `torch.compile`, with CUDA graphs on CUDA.

The parts of a cycle that run models are compiled, each as one graph without breaks:

=========  ========================================================  =============================================
part       shapes that recur                                         padding
=========  ========================================================  =============================================
verify     nodes: a few sizes up to the tree's; columns: `bucket`    nodes that see the past, and are cut off again
extend     the most rows that one cycle can accept; columns          rows whose outputs and cache rows are not used
step       the frontier's width; columns                             none
children   one hidden state, the first level's                       none
keep       nodes, as verify                                          rows that stay where they are
=========  ========================================================  =============================================

Not compiled: prefill (its length differs each time), selection of nodes and acceptance (small, and their results go to
the host), and batches (their shapes change when a sequence ends).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle.decode.compiled.static_cache import StaticCache, move_rows
from eagle.decode.drafter import Drafter
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.compression import Compression
from eagle.drafts.head import DraftHead
from eagle.drafts.msd import DraftModel
from eagle.families.base import LayerMasks, Target
from eagle.kv_cache import KVCache
from llava.errors import UserError

SIZES = (1, 8, 16, 32, 64, 128)
"""Tree sizes that have a compiled forward, besides the tree's largest; others are padded. With CUDA graphs only the
first: on an accelerator padding is cheap and recording a graph is expensive."""
GRAPHS = 256
"""Maximal number of graphs of one part. torch's own limit of 8 is less than columns times sizes."""


class Compiler:
    """Compiles functions for one device.

    Args:
        backend: of `torch.compile`; "inductor" records CUDA graphs on a CUDA device.

    Raises:
        UserError: torch does not know the backend.
    """

    def __init__(self, backend: str, device: torch.device) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise UserError(f"no compiler backend '{backend}'", fix=f"use one of {', '.join(known)}")
        self.graphs = backend == "inductor" and device.type == "cuda"
        self._settings: dict[str, Any] = {"backend": backend, "dynamic": False}
        if self.graphs:
            self._settings["mode"] = "reduce-overhead"
        accepted = signature(torch.compile).parameters
        if "recompile_limit" in accepted:
            self._settings |= {"recompile_limit": GRAPHS, "isolate_recompiles": True}
        else:
            dynamo = torch._dynamo.config
            name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
            setattr(dynamo, name, max(getattr(dynamo, name), GRAPHS))

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled ``function``. Its results stay valid after the next call."""
        compiled = torch.compile(function, **self._settings)
        if not self.graphs:
            return compiled

        def call(*arguments: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may now overwrite the last results
            result = compiled(*arguments)
            if isinstance(result, tuple):
                return tuple(part.clone() for part in result)
            return result if result is None else result.clone()

        return call


class CachePool:
    """Caches of one model, reused by later requests so that graphs find the same memory. A request makes a new cache if
    none is free. Requests may come from several threads."""

    def __init__(self, make: Callable[[int], StaticCache], static_addresses: bool) -> None:
        self._make, self._static_addresses = make, static_addresses
        self._free: StaticCache | None = None
        self._lock = Lock()

    def take(self, rows: int) -> StaticCache:
        """An empty cache of at least ``rows`` rows."""
        with self._lock:
            free, self._free = self._free, None
        if free is not None and free.capacity >= rows:
            free.truncate([0])
            return free
        cache = self._make(rows)
        if self._static_addresses:
            for layer in cache.layers:
                torch._dynamo.mark_static_address(layer.store_k)
                torch._dynamo.mark_static_address(layer.store_v)
        return cache

    def give_back(self, cache: KVCache) -> None:
        """Returns the cache of a finished request. The larger of two free ones is kept."""
        with self._lock:
            if isinstance(cache, StaticCache) and (self._free is None or cache.capacity >= self._free.capacity):
                self._free = cache


class StaticEngine:
    """The compiled parts of one pair of models, for requests of a single sequence.

    Args:
        backend: of `torch.compile`.

    Raises:
        UserError: the backend is unknown, the target is spread over several devices, or the draft is not an MSD one.
    """

    def __init__(self, target: Target, draft: DraftHead | None, backend: str = "inductor") -> None:
        if not target.verifies_trees:
            raise UserError(f"{target.family} has layers with a state, which are not compiled", fix="leave compile out")
        if draft is not None and not isinstance(draft, DraftModel):
            raise UserError(f"{draft.kind} heads are not compiled", fix="leave compile out")
        devices = {parameter.device for parameter in target.text_model.parameters()} | {target.head_device}
        if len(devices) > 1:
            raise UserError(
                "a model spread over several devices cannot be compiled", fix="load it on one, or leave compile out"
            )
        self.target, self.draft = target, draft
        compiled = Compiler(backend, target.device)
        self.sizes = SIZES[:1] if compiled.graphs else SIZES
        move = compiled(move_rows)
        self.target_caches = CachePool(partial(self._target_cache, move), compiled.graphs)
        self.verify_nodes = compiled(verifier(target))
        if draft is not None:
            head = target.head_function()
            self.draft_caches = CachePool(partial(self._draft_cache, draft, move), compiled.graphs)
            self.extend, self.step, self.children = (compiled(part) for part in draft_parts(draft, head))

    def verify(
        self, tokens: Tensor, positions: Tensor, masks: LayerMasks, cache: StaticCache, largest: int
    ) -> tuple[Tensor, Tensor]:
        """`Target.verify` and `Target.head` for one tree of at most ``largest`` nodes.

        Args:
            tokens, positions: [1, N].
            masks: [1, 1, N, past + N] additive, by type of layer if the model has several.

        Returns:
            hidden states [1, N, H] and logits [1, N, V].
        """
        count = tokens.shape[1]
        size = min(each for each in (*self.sizes, largest) if each >= count)
        columns = cache.open(size)
        tokens, positions = (F.pad(part, (0, size - count)) for part in (tokens, positions))
        if isinstance(masks, dict):
            padded: LayerMasks = {kind: filled(mask, size, columns) for kind, mask in masks.items() if mask is not None}
        else:
            padded = filled(masks, size, columns)
        hidden, logits = self.verify_nodes(tokens, self.target.text_positions(positions), padded, cache)
        cache.close(size)
        return hidden[:, :count], logits[:, :count]

    def release(self, cache: KVCache, drafter: Drafter | None) -> None:
        """Returns the caches of a finished request."""
        self.target_caches.give_back(cache)
        if drafter is not None:
            self.draft_caches.give_back(drafter.cache)

    def _target_cache(self, move: Callable[..., None], rows: int) -> StaticCache:
        target = self.target
        return StaticCache(target.cache_shapes, rows, target.dtype, target.device, move)

    @staticmethod
    def _draft_cache(draft: DraftModel, move: Callable[..., None], rows: int) -> StaticCache:
        config = draft.config
        shape = (config.num_key_value_heads, config.head_dim)
        return StaticCache([shape], rows, draft.dtype, draft.device, move)


class StaticDrafter(Drafter):
    """`Drafter` for one sequence on the compiled parts of an engine."""

    def __init__(
        self, engine: StaticEngine, draft: DraftHead, capacity: int, tree: TreeConfig, compression: Compression | None
    ) -> None:
        self._engine = engine
        super().__init__(draft, engine.target.head, capacity, tree, 1, compression)

    def _new_cache(self, batch: int, rows: int) -> KVCache:
        return self._engine.draft_caches.take(rows)

    def _read(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        count, size = tokens.shape[1], self._causal.shape[-1]
        mask, cache = self._masks.window(self._lengths, self._causal[:, :count, :count]), self._static_cache
        columns = cache.open(size)
        tokens, hidden = F.pad(tokens, (0, size - count)), F.pad(hidden, (0, 0, 0, size - count))
        output = self._engine.extend(tokens, hidden, filled(mask, size, columns), *self._rope(0, size), cache)
        cache.close(count)
        return output[:, :count]

    def _step(
        self, tokens: Tensor, hidden: Tensor, tree_mask: Tensor, step: int, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = tokens.shape[1]
        mask, cache = self._masks.window(self._lengths, tree_mask), self._static_cache
        columns = cache.open(width)
        mask = filled(mask, width, columns)
        result = self._engine.step(tokens, hidden.contiguous(), mask, *self._rope(step, 1), cache, top_k)
        cache.close(width)
        return result

    def _children(self, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return self._engine.children(hidden, top_k)

    @property
    def _static_cache(self) -> StaticCache:
        assert isinstance(self.cache, StaticCache)
        return self.cache


def filled(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Pads an additive mask [1, 1, n, w] to [1, 1, rows, columns]. New columns are masked. A new row sees what the
    first one sees, because a row that sees nothing may give NaN."""
    mask = F.pad(mask, (0, columns - mask.shape[-1]), value=torch.finfo(mask.dtype).min)
    return torch.cat([mask, mask[:, :, :1].expand(-1, -1, rows - mask.shape[2], -1)], dim=2)


def verifier(target: Target) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of `StaticEngine.verify`, as a function to compile."""
    text_model, read = target.text_model, target.token_reader()
    head, cache_argument = target.head_function(), target.cache_argument

    def verify(tokens: Tensor, positions: Tensor, mask: LayerMasks, cache: StaticCache) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = {cache_argument: cache, **read(tokens)}
        output = text_model(attention_mask=mask, position_ids=positions, use_cache=True, **given)
        return output.last_hidden_state, head(output.last_hidden_state)

    return verify


def draft_parts(draft: DraftModel, head: Callable[[Tensor], Tensor]) -> tuple[Callable[..., Any], ...]:
    """The draft's three forwards as functions to compile: extend, step, children."""

    def extend(tokens: Tensor, hidden: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: StaticCache) -> Tensor:
        x = draft.fuse(hidden, draft.embed_tokens(tokens))  # [1, n, H]
        return draft(x, None, mask, cache, (cos, sin))

    def step(
        tokens: Tensor, hidden: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: StaticCache, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = extend(tokens, hidden, mask, cos, sin, cache)  # [1, k, H]
        return output, *draft.likely_next(output, top_k, head)

    def children(hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return draft.likely_next(hidden, top_k, head)

    return extend, step, children

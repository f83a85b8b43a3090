"""Decoding with static shapes through `torch.compile`, with CUDA graphs on CUDA.

The parts of a cycle that run models are compiled, each once for single sequences and once for batches, as one graph
without breaks. Their numbers of rows and of columns, the capacity of the cache, and the number of sequences of a batch
are marked as dynamic:

==========  ==================================================================================================
part        rows
==========  ==================================================================================================
verify      the nodes of a tree; with CUDA graphs always those of the largest, so that one graph is recorded
plain step  one: what `verify` does with a root alone, compiled as a constant
extend      those that a cycle has accepted, at least 2; with CUDA graphs as many as one cycle can accept
block       the same, and mask rows: what a block head has in place of extend and step
step        the frontier's width, at least 2
children    one, the first level's parent, or those of all levels of a block; as many children as the frontier is wide
keep        as verify; rows that stay where they are included
==========  ==================================================================================================

Cycles with the tree of the warm-up do not use these, but for `verify` and the plain step: selection of nodes and
acceptance are compiled there too, and the host knows nothing but the tokens (`eagle.decode.compiled.cycle`). Requests
with other trees, and logits processors that read other tokens, use the parts.

A batch of at most `LARGEST_BATCH` sequences has a slot for each. When one ends, the others move to the first slots, and
the last one is decoded as a single sequence. Without CUDA graphs a forward computes as many slots as there are
sequences; with them a power of two, each of which is recorded.

Columns grow in steps (`bucket`); CUDA graphs are recorded for each, without compiling again. `StaticEngine.warm_up`
does all of it before the first request.

Not compiled: prefill (its length differs each time), larger batches, and in batches outside of whole cycles the
selection of nodes and acceptance, sequence by sequence.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from threading import Lock, get_ident
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils._triton import has_triton
from tqdm import tqdm

from eagle.decode.block import BlockDrafter
from eagle.decode.compiled.cycle import CompiledCycle, CycleRun
from eagle.decode.compiled.static_cache import StaticCache, bucket, buckets, dynamic, move_rows, padded, padded_slots
from eagle.decode.drafter import Drafter
from eagle.decode.sequence import Sequence as Answer
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.block import BlockDraft
from eagle.drafts.compression import Compression
from eagle.drafts.head import DraftHead
from eagle.families.base import LayerMasks, Target
from eagle.families.layers import position_limit
from eagle.kv_cache import KVCache
from llava.errors import UserError

POSITIONS = 4096
"""Rows of the first cache with CUDA graphs, if the model has so many positions. Graphs are recorded again for a larger
one."""
LARGEST_BATCH = 16
"""Sequences of the largest batch that is compiled."""
SET_APART = (2, 4)
"""Numbers of sequences with which batches are compiled."""
DEEPEST = 16
"""Depth of the largest tree of whole cycles: their draft phase is compiled with all levels as one function."""
DELAY = 2.0
"""Seconds before a progress bar appears."""
RECORDED = 3
"""Calls of a function until its CUDA graph is replayed: the first runs without, the second records."""


DraftInputs = tuple[Tensor, Tensor, Tensor | None, Tensor, tuple[Tensor, Tensor]]
"""Tokens, hidden states, context, mask and angles of a part of the draft."""

log = logging.getLogger(__name__)


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
        settings: dict[str, Any] = {"backend": backend, "dynamic": False}  # but for sizes that are marked
        if self.graphs:
            settings["mode"] = "reduce-overhead"
        self._compile = partial(torch.compile, **settings)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled ``function``. Its results stay valid after the next call."""
        compiled = self._compile(own_code(function))
        if not self.graphs:
            return compiled

        def call(*arguments: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may now overwrite the last results
            return tree_map_only(Tensor, Tensor.clone, compiled(*arguments))

        return call


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function with a code object of its own: torch compiles the same one for a few sizes only
    (``recompile_limit``), and those of all engines of a process would count together."""
    if not isinstance(function, FunctionType):
        return function
    code, closure = function.__code__.replace(), function.__closure__
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)


class CachePool:
    """Caches of one model, reused by later requests so that graphs find the same memory. A request makes a new cache if
    none is free. Requests may come from several threads.

    Args:
        make: a cache of so many rows for so many sequences.
        least: rows of the smallest cache.
    """

    def __init__(self, make: Callable[[int, int], StaticCache], least: int = 1) -> None:
        self._make, self._least = make, least
        self._free: StaticCache | None = None
        self._lock = Lock()

    def take(self, rows: int, sequences: int = 1) -> StaticCache:
        """An empty cache of at least ``rows`` rows for each of so many sequences."""
        with self._lock:
            free, self._free = self._free, None
        if free is not None and free.capacity >= rows and free.room >= sequences:
            free.start(sequences)
            return free
        return self._make(max(rows, self._least), sequences)

    def give_back(self, cache: StaticCache) -> None:
        """Returns the cache of a finished request. The larger of two free ones is kept."""

        def size(cache: StaticCache) -> int:
            return cache.room * cache.capacity

        with self._lock:
            if self._free is None or size(cache) >= size(self._free):
                self._free = cache

    def drop_idle(self) -> None:
        """Frees the cache that is kept for a later request."""
        with self._lock:
            self._free = None


class Pools:
    """The caches of one model: of single sequences and of batches, since graphs are bound to their memory.

    Args:
        make, least: as for `CachePool`. A cache of a batch has the rows that a request needs.
    """

    def __init__(self, make: Callable[[int, int], StaticCache], least: int) -> None:
        self.single, self.batches = CachePool(make, least), CachePool(make)

    def take(self, rows: int, sequences: int = 1) -> StaticCache:
        return (self.single if sequences == 1 else self.batches).take(rows, sequences)

    def give_back(self, cache: KVCache) -> None:
        """As `CachePool.give_back`. A cache whose growth failed is dropped."""
        if isinstance(cache, StaticCache) and cache.slots:
            (self.single if cache.room == 1 else self.batches).give_back(cache)

    def drop_idle(self) -> None:
        """As `CachePool.drop_idle`."""
        self.single.drop_idle()
        self.batches.drop_idle()


class StaticEngine:
    """The compiled parts of one pair of models, for requests of at most `LARGEST_BATCH` sequences.

    Args:
        backend: of `torch.compile`.

    Raises:
        UserError: the backend is unknown, or the target has no static path.
    """

    def __init__(self, target: Target, draft: DraftHead | None, backend: str = "inductor") -> None:
        if (reason := obstacle(target)) is not None:
            raise UserError(reason, fix="leave compile out")
        self.target, self.draft = target, draft
        self._thread: int | None = None
        self._refused = False
        self._compiler = compiled = Compiler(backend, target.device)
        self.graphs = compiled.graphs
        limit = position_limit(target.config.get_text_config()) or POSITIONS
        self.positions = min(limit, POSITIONS) if self.graphs else 1
        move = compiled(move_rows)
        self.target_caches = Pools(partial(self._target_cache, move), self.positions)
        self._cycles: dict[tuple[int, int, int], CompiledCycle] = {}
        self.verify_nodes = compiled(verifier(target, () if draft is None else draft.target_layers))
        if draft is not None:
            head = target.head_function()
            self.draft_caches = Pools(partial(self._draft_cache, draft, move), self.positions)
            parts = draft_parts(draft, head)
            self._extend, self._step, self._children, self._block = (compiled(part) for part in parts)

    def serves(self, sequences: int) -> bool:
        """Whether a request of so many sequences may use the compiled parts."""
        return sequences <= LARGEST_BATCH and self.serves_this_thread()

    def sizes_of(self, sequences: int) -> int:
        """The same number for all batches that are compiled, or recorded, as one."""
        return padded_slots(sequences) if self.graphs else min(sequences, 2)

    def serves_this_thread(self) -> bool:
        """Whether a request of this thread may use the compiled parts: CUDA graphs belong to the thread that was
        first. Says so the first time that it may not."""
        if not self.graphs:
            return True
        self._thread = self._thread or get_ident()
        if self._thread != get_ident() and not self._refused:
            self._refused = True
            log.warning("requests of other threads are not compiled: CUDA graphs belong to the first one")
        return self._thread == get_ident()

    def verify(
        self, tokens: Tensor, positions: Tensor, masks: LayerMasks, cache: StaticCache, largest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`Target.verify` and `Target.head` for trees of at most ``largest`` nodes.

        Args:
            tokens, positions: [B, N].
            masks: [B, 1, N, longest past + N] additive, by type of layer if the model has several.

        Returns:
            hidden states [B, N, H], logits [B, N, V] and what the draft reads, [B, N, F].
        """
        batch, count = tokens.shape
        size = largest if self.graphs and count > 1 else count
        columns, slots = cache.open(size), cache.slots
        if isinstance(masks, dict):
            given = {kind: mask for kind, mask in masks.items() if mask is not None}
            full: LayerMasks = {kind: filled(mask, slots, size, columns) for kind, mask in given.items()}
        else:
            full = filled(masks, slots, size, columns)
        rows = padded(tokens, slots, size), padded(positions, slots, size)
        hidden, logits, features = (part[:batch, :count] for part in self.verify_nodes(*rows, full, cache))
        cache.close(size)
        return hidden, logits, features

    def extend(
        self,
        tokens: Tensor,
        hidden: Tensor,
        context: Tensor | None,
        mask: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: StaticCache,
    ) -> Tensor:
        """The draft's forward over accepted rows, padded to those of ``rope``.

        Args:
            tokens: [B, n]; ``hidden``: [B, n, F]; ``mask``: [B, 1, n, longest past + n] additive.
            context: [B, C] of the prompts, if the draft has one.
            rope: of the rows and the padding, [B, 1, S, D] each.

        Returns:
            outputs [B, n, H].
        """
        (batch, count), size = tokens.shape, rope[0].shape[2]
        columns, slots = cache.open(size), cache.slots
        output = self._extend(
            padded(tokens, slots, size),
            padded(hidden, slots, size),
            None if context is None else padded(context, slots),
            filled(mask, slots, size, columns),
            *(dynamic(padded(part, slots), 2) for part in rope),
            cache,
        )
        cache.close(count)
        return output[:batch, :count]

    def step(
        self,
        tokens: Tensor,
        hidden: Tensor,
        context: Tensor | None,
        mask: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: StaticCache,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One level of the draft, with as many children of each node as there are nodes.

        Args:
            tokens: [B, k]; ``hidden``: [B, k, H]; ``mask``: [B, 1, k, longest past + k] additive.
            context: as in `extend`; ``rope``: [B, 1, 1, D] each.

        Returns:
            outputs [B, k, H], and ids and log-probabilities of the children, [B, k, k] each.
        """
        batch, width = tokens.shape
        size = max(width, 2)
        columns, slots = cache.open(size), cache.slots
        output, ids, logprobs = self._step(
            padded(tokens, slots, size),
            padded(hidden, slots, size),
            None if context is None else padded(context, slots),
            filled(mask, slots, size, columns),
            *(padded(part, slots) for part in rope),
            cache,
        )
        cache.close(width)
        return output[:batch, :width], ids[:batch, :width, :width], logprobs[:batch, :width, :width]

    def block(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor], cache: StaticCache, size: int) -> Tensor:
        """A block head's forward over accepted rows and mask rows, padded to ``size``.

        Args:
            x: [B, n, X]; ``mask``: [B, 1, n, longest past + n] additive; ``rope``: [B, 1, n, D] each.

        Returns:
            outputs [B, n, H].
        """
        (batch, count), columns, slots = x.shape[:2], cache.open(size), cache.slots
        angles = (padded(part, slots, 1, size) for part in rope)
        output = self._block(padded(x, slots, size), filled(mask, slots, size, columns), *angles, cache)
        cache.close(count)
        return output[:batch, :count]

    def children(self, hidden: Tensor, top_k: int, slots: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities of the ``top_k`` first drafted tokens [B, k] each, after outputs [B, H]; or
        [B, L, k] each, after the outputs [B, L, H] of all levels of a block."""
        count, own = dynamic(torch.empty(max(top_k, 2), device=hidden.device), 0), hidden.shape[:-1]
        ids, logprobs = self._children(padded(hidden, slots, *(max(size, 2) for size in own[1:])), count)
        within = tuple(slice(size) for size in (*own, top_k))
        return ids[within], logprobs[within]

    def extended(self, count: int, longest: int) -> int:
        """Rows of the draft's forward over ``count`` accepted ones of at most ``longest``."""
        return longest if self.graphs else max(count, 2)

    def warm_up(self, trees: Mapping[int, TreeConfig], positions: int = 1, progress: bool = True) -> None:
        """Compiles all parts, and records all CUDA graphs.

        Args:
            trees: for each number of sequences that requests will have, their tree.
            positions: of the longest request, prompt and answer. With CUDA graphs at least `POSITIONS` are recorded for
                single sequences.
            progress: show a bar.
        """
        if not self.serves_this_thread():
            return
        taken, calls = list[tuple[Pools, StaticCache]](), list[Callable[[], object]]()
        single = {count: tree for count, tree in trees.items() if count == 1}
        batches = {count: tree for count, tree in trees.items() if 1 < count <= LARGEST_BATCH}
        try:
            for group in (single, batches):
                if group:
                    calls += self._calls(group, positions, taken)
            for call in tqdm(calls, "compiling", unit="part", delay=DELAY, disable=not progress, file=sys.stderr):
                for _ in range(RECORDED if self.graphs else 1):
                    call()
        finally:
            for pool, cache in taken:
                pool.give_back(cache)

    def _calls(
        self, trees: Mapping[int, TreeConfig], positions: int, taken: list[tuple[Pools, StaticCache]]
    ) -> list[Callable[[], object]]:
        """The calls of `warm_up` for single sequences, or for batches. ``taken`` gets their caches."""
        batches = max(trees) > 1
        room = max(*trees, *SET_APART) if batches else 1
        cache = self.target_caches.take(positions, room)
        taken.append((self.target_caches, cache))
        cycles = {tree: None if self.draft is None else self._new_cycle(self.draft, tree) for tree in trees.values()}
        draft_cache = cache
        if self.draft is not None:
            drafted = max(1 if cycle is None else cycle.drafted for cycle in cycles.values())
            draft_cache = self.draft_caches.take(max(positions, drafted), room)
            taken.append((self.draft_caches, draft_cache))
        calls = []
        for count, tree in trees.items():
            caches, least = (cache, draft_cache), [bucket(tree.total_tokens)]
            columns, draft_columns = (buckets(each.capacity) if self.graphs else least for each in caches)
            if batches:
                calls += self._calls_of(None, tree, cycles[tree], caches, (columns[:1], draft_columns[:1]))
            recorded = {1, *(padded_slots(part) for part in range(2, count + 1))} if self.graphs else {1}
            for sequences in sorted(recorded):
                calls += self._calls_of(sequences, tree, cycles[tree], caches, (columns, draft_columns))
        return calls

    def _calls_of(
        self,
        sequences: int | None,
        tree: TreeConfig,
        cycle: CompiledCycle | None,
        caches: tuple[StaticCache, StaticCache],
        columns: tuple[Sequence[int], Sequence[int]],
    ) -> list[Callable[[], object]]:
        """Calls for so many sequences; None: for a number that differs from the other dynamic sizes, because torch
        compiles sizes that are equal in the first call as one. ``caches`` of target and draft, and the ``columns`` of
        each."""

        def count(rows: int) -> int:
            return sequences or next(apart for apart in SET_APART if apart != rows)

        sizes, calls = {1}, list[Callable[[], object]]()
        if self.draft is not None:
            calls += self._draft_calls(self.draft, caches[1], tree, columns[1], count)
            sizes.add(tree.total_tokens)
            if cycle is not None:
                sizes.add(cycle.nodes)
                calls += cycle.calls(self.target, self.draft, caches, columns, count(1))
        return calls + self._target_calls(caches[0], sizes, columns[0], count)

    def _new_cycle(self, draft: DraftHead, tree: TreeConfig) -> CompiledCycle | None:
        """Whole cycles with this tree. None if it has no fixed size, or is too deep to be compiled as one function."""
        size = (tree.depth, tree.top_k, tree.total_tokens)
        fixed = not tree.adaptive and tree.top_k <= draft.vocabulary(self.target.vocab_size)
        if not fixed or tree.total_tokens == 1 or tree.depth > DEEPEST:
            return None
        if size not in self._cycles:
            self._cycles[size] = CompiledCycle(self.target, draft, tree, self._compiler, self.verify_nodes)
        return self._cycles[size]

    def cycle(self, tree: TreeConfig, sequences: int = 1) -> CompiledCycle | None:
        """Whole cycles with this tree. None if `warm_up` has not compiled them."""
        cycle = self._cycles.get((tree.depth, tree.top_k, tree.total_tokens))
        return cycle if cycle is not None and min(sequences, 2) in cycle.compiled_for else None

    def _target_calls(
        self, cache: StaticCache, sizes: Iterable[int], columns: Sequence[int], count: Callable[[int], int]
    ) -> list[Callable[[], object]]:
        """Verification of trees of ``sizes`` nodes at the end of ``columns``. ``count``: sequences for such a size."""
        target, device = self.target, self.target.device

        def verify(size: int, width: int) -> None:
            batch, past = count(size), width - size
            nodes = torch.arange(size, device=device).expand(batch, -1)  # [B, N]
            cache.start(batch)
            cache.truncate([past] * batch)
            mask = torch.zeros(batch, 1, size, width, dtype=target.dtype, device=device)
            masks = target.masks_by_layer(mask, [past] * batch, nodes)
            self.verify(nodes * 0, past + nodes, masks, cache, size)
            cache.keep([past] * batch, [[0, size - 1] if size > 1 else [0]] * batch)

        return [partial(verify, size, width) for size in sorted(sizes) for width in columns]

    def _draft_calls(
        self,
        draft: DraftHead,
        cache: StaticCache,
        tree: TreeConfig,
        columns: Sequence[int],
        count: Callable[[int], int],
    ) -> list[Callable[[], object]]:
        """The draft's parts at the end of ``columns``. ``count``: sequences for so many rows."""
        longest, device, size = tree.depth + 2, draft.device, draft.config.hidden_size
        features = max(len(draft.target_layers), 1) * self.target.hidden_size
        zeros = partial(torch.zeros, dtype=draft.dtype, device=device)

        def inputs(rows: int, width: int, each: int, angles: int) -> DraftInputs:
            batch, context = count(max(rows, 2)), draft.empty_context()
            cache.start(batch)
            cache.truncate([width - rows] * batch)
            tokens = torch.zeros(batch, rows, dtype=torch.long, device=device)
            context = None if context is None else context.expand(batch, -1)
            rope = draft.rotary(torch.arange(angles, device=device).expand(batch, -1), draft.dtype)
            return tokens, zeros(batch, rows, each), context, zeros(batch, 1, rows, width), rope

        def extend(width: int) -> None:
            self.extend(*inputs(longest, width, features, longest), cache)

        def step(width: int) -> None:
            self.step(*inputs(tree.top_k, width, size, 1), cache)

        def block(width: int) -> None:
            rows = longest + tree.depth
            _, x, _, mask, rope = inputs(rows, width, draft.fc.out_features, rows)
            self.block(x, mask, rope, cache, rows)

        def children(*levels: int) -> None:
            batch = count(max(tree.top_k, 2))
            cache.start(batch)
            self.children(zeros(batch, *levels, size), tree.top_k, cache.slots)

        if isinstance(draft, BlockDraft):
            levels = tree.depth + 1
            apart = levels + tree.top_k + max(SET_APART)  # equal sizes would be compiled as one
            return [
                *(partial(children, each) for each in (apart, levels)),
                *(partial(block, width) for width in columns),
            ]
        return [children, *(partial(part, width) for part in (extend, step) for width in columns)]

    def release(self, cache: KVCache, drafter: Drafter | None, clear: bool = False) -> None:
        """Returns the caches of a finished request. ``clear``: it failed, so rows may not be numbers, which would spoil
        the results of others even where they are masked."""
        pools = [(self.target_caches, cache)]
        if drafter is not None:
            pools.append((self.draft_caches, drafter.cache))
        for pool, part in pools:
            if clear and isinstance(part, StaticCache):
                part.clear()
            pool.give_back(part)

    def drop_idle(self) -> None:
        """Frees the caches that are kept for later requests, of single sequences and of batches."""
        self.target_caches.drop_idle()
        if self.draft is not None:
            self.draft_caches.drop_idle()

    def _target_cache(self, move: Callable[..., None], rows: int, sequences: int) -> StaticCache:
        target = self.target
        return StaticCache(target.cache_shapes, rows, target.dtype, target.device, move, self.graphs, sequences)

    def _draft_cache(self, draft: DraftHead, move: Callable[..., None], rows: int, sequences: int) -> StaticCache:
        shapes = [(draft.config.num_key_value_heads, draft.config.head_dim)] * len(draft.layers)
        return StaticCache(shapes, rows, draft.dtype, draft.device, move, self.graphs, sequences)


class StaticDrafter(Drafter):
    """`Drafter` on the compiled parts of an engine."""

    def __init__(
        self,
        engine: StaticEngine,
        draft: DraftHead,
        capacity: int,
        tree: TreeConfig,
        batch: int,
        compression: Compression | None,
    ) -> None:
        self._engine = engine
        super().__init__(draft, engine.target.head, capacity, tree, batch, compression)

    def _new_cache(self, batch: int, rows: int) -> KVCache:
        return self._engine.draft_caches.take(rows, batch)

    def leave_compiled(self) -> None:
        """Drafts without the compiled parts from now on."""
        assert isinstance(self.cache, StaticCache)
        self.cache = self.cache.growing()

    def _read(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        if (cache := self._static_cache) is None:
            return super()._read(tokens, hidden)
        (batch, count), engine = tokens.shape, self._engine
        mask = self._mask(self._causal[:, :count, :count].expand(batch, -1, -1), [1] * count)
        rope = self._rope(0, engine.extended(count, self._causal.shape[-1]))
        return engine.extend(tokens, hidden, self._context, mask, rope, cache)

    def _step(
        self, top_k: int, tokens: Tensor, hidden: Tensor, tree_mask: Tensor, widths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (cache := self._static_cache) is None:
            return super()._step(top_k, tokens, hidden, tree_mask, widths)
        mask, rope = self._mask(tree_mask, widths), self._rope(len(widths) - 1, 1)
        return self._engine.step(tokens, hidden, self._context, mask, rope, cache)

    def _children(self, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if (cache := self._static_cache) is None:
            return super()._children(hidden, top_k)
        ids, logprobs = self._engine.children(hidden[:, 0], top_k, cache.slots)
        return ids.unsqueeze(1), logprobs.unsqueeze(1)

    def start_cycles(
        self, cycle: CompiledCycle, answers: Sequence[Answer], left: Sequence[int], cache: StaticCache
    ) -> CycleRun:
        """Whole cycles from here on.

        Args:
            left: new tokens that each answer still wants.
            cache: of the target.
        """
        assert isinstance(self.cache, StaticCache)
        past, slots = cache.lengths, cache.slots
        counters = [
            (draft_past, 0, shift, rows, int(answer.next_position), wanted, len(answer.tokens))
            for draft_past, shift, rows, answer, wanted in zip(
                self._lengths, self._shift, past, answers, left, strict=True
            )
        ]
        state = cycle.state(self._engine.target, self.draft, slots, counters, [each.tokens[-1] for each in answers])
        context = None if self._context is None else padded(self._context, slots)
        rows = (past, self._lengths)
        return CycleRun(cycle, answers, (cache, self.cache), rows, padded(self._ends, slots), context, state)

    def end_cycles(self, run: CycleRun) -> None:
        """Leaves caches and answer as if all cycles had been decoded without `CycleRun`. Cycles in flight are dropped:
        there are some only if the answer has ended."""
        run.end()
        self._lengths = run.draft_past

    @property
    def _ends(self) -> Tensor:
        """What a cycle needs of the newest rows if the last cycle accepted none, [B, `newest_size`]."""
        return self._last

    @property
    def _static_cache(self) -> StaticCache | None:
        return self.cache if isinstance(self.cache, StaticCache) else None


class StaticBlockDrafter(StaticDrafter, BlockDrafter):
    """`BlockDrafter` on the compiled parts of an engine."""

    def _forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if (cache := self._static_cache) is None:
            return super()._forward(x, mask, rope)
        size = self._engine.extended(x.shape[1], self._causal.shape[-1] + self._mask_count)
        return self._engine.block(x, mask, rope, cache, size)

    def _children(self, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if (cache := self._static_cache) is None:
            return super()._children(hidden, top_k)
        return self._engine.children(hidden, top_k, cache.slots)

    @property
    def _ends(self) -> Tensor:
        assert self._newest is not None
        return torch.cat([self._last, self._newest], dim=-1)


def filled(mask: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    """Pads an additive mask [B, 1, n, w] to [slots, 1, rows, columns]. New columns are masked. A new row sees what the
    first one of its sequence sees, a new slot what the first slot sees: a row that sees nothing may give NaN."""
    batch, _, count, width = mask.shape
    full = mask.new_full((slots, 1, rows, columns), torch.finfo(mask.dtype).min)
    full[:batch, :, :count, :width] = mask
    full[:batch, :, count:, :width] = mask[:, :, :1]
    if batch < slots:
        full[batch:] = full[:1]
    return dynamic(full, 0, 2, 3)


def verifier(target: Target, layers: Sequence[int]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The forward of `StaticEngine.verify`, as a function to compile. ``layers``: whose streams the draft reads."""
    text_model, read = target.text_model, target.token_reader()
    head, cache_argument = target.head_function(), target.cache_argument

    def forward(tokens: Tensor, positions: Tensor, mask: LayerMasks, cache: StaticCache) -> Tensor:
        given: dict[str, Any] = {cache_argument: cache, **read(tokens)}
        own_positions = target.text_positions(positions)
        return text_model(attention_mask=mask, position_ids=own_positions, use_cache=True, **given).last_hidden_state

    with_streams = target.reader_with_streams(forward, layers)

    def verify(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, streams = with_streams(*given)
        return hidden, head(hidden), hidden if streams is None else streams

    return verify


def draft_parts(draft: DraftHead, head: Callable[[Tensor], Tensor]) -> tuple[Callable[..., Any], ...]:
    """The draft's forwards as functions to compile: extend, step, children, block."""

    def forward(tokens: Tensor, hidden: Tensor, context: Tensor | None, *rest: Any) -> Tensor:
        mask, cos, sin, cache = rest
        x = draft.text_rows(hidden, tokens, context)  # [B, n, X]
        return draft(x, None, mask, cache, (cos, sin))

    def extend(tokens: Tensor, features: Tensor, *rest: Any) -> Tensor:
        return forward(tokens, draft.condense(features), *rest)

    def step(tokens: Tensor, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = forward(tokens, hidden, *rest)  # [B, k, H]
        return output, *draft.likely_next(output, tokens.shape[1], head)

    def children(hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return draft.likely_next(hidden, places.shape[0], head)

    def block(x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
        return draft(x, None, mask, cache, (cos, sin))

    return extend, step, children, block


def obstacle(target: Target) -> str | None:
    """Why a target cannot be compiled. None if it can."""
    if not target.verifies_trees:
        return f"{target.family} has layers with a state, which are not compiled"
    devices = {parameter.device for parameter in target.text_model.parameters()} | {target.head_device}
    return None if len(devices) == 1 else "a model spread over several devices cannot be compiled: load it on one"


def obstacle_by_default(target: Target) -> str | None:
    """Why a target on CUDA is not compiled unless that is asked for. None if it is."""
    if getattr(target.config, "quantization_config", None) is not None:
        return "compiling quantised base models is not tested"
    if not has_triton():
        return "Triton is not installed, or does not know this GPU"
    return obstacle(target)


def skipped_graphs() -> int:
    """Compiled functions of this process for which torch recorded no CUDA graph."""
    from torch._dynamo.utils import counters  # slow to import

    return counters["inductor"]["cudagraph_skips"]

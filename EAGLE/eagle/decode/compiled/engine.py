"""Decoding with static shapes through `torch.compile`, with CUDA graphs on CUDA.

The parts of a cycle that run models are compiled, each once and as one graph without breaks. Their numbers of rows and
of columns, and the capacity of the cache, are marked as dynamic:

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

Columns grow in steps (`bucket`); CUDA graphs are recorded for each, without compiling again. `StaticEngine.warm_up`
does all of it before the first request.

Not compiled: prefill (its length differs each time) and batches (their shapes change when a sequence ends).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils._triton import has_triton
from tqdm import tqdm

from eagle.decode.block import BlockDrafter
from eagle.decode.compiled.cycle import CompiledCycle, CycleRun
from eagle.decode.compiled.static_cache import StaticCache, bucket, buckets, dynamic, move_rows
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


DEEPEST = 16
"""Depth of the largest tree of whole cycles: their draft phase is compiled with all levels as one function."""
DELAY = 2.0
"""Seconds before a progress bar appears."""
RECORDED = 3
"""Calls of a function until its CUDA graph is replayed: the first runs without, the second records."""


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
        compiled = self._compile(function)
        if not self.graphs:
            return compiled

        def call(*arguments: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may now overwrite the last results
            return tree_map_only(Tensor, Tensor.clone, compiled(*arguments))

        return call


class CachePool:
    """Caches of one model, reused by later requests so that graphs find the same memory. A request makes a new cache if
    none is free. Requests may come from several threads.

    Args:
        make: a cache of so many rows.
        least: rows of the smallest cache.
    """

    def __init__(self, make: Callable[[int], StaticCache], least: int = 1) -> None:
        self._make, self._least = make, least
        self._free: StaticCache | None = None
        self._lock = Lock()

    def take(self, rows: int) -> StaticCache:
        """An empty cache of at least ``rows`` rows."""
        with self._lock:
            free, self._free = self._free, None
        if free is not None and free.capacity >= rows:
            free.truncate([0])
            return free
        return self._make(max(rows, self._least))

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
        self.target_caches = CachePool(partial(self._target_cache, move), self.positions)
        self._cycles: dict[tuple[int, int, int], CompiledCycle] = {}
        self.verify_nodes = compiled(verifier(target, () if draft is None else draft.target_layers))
        if draft is not None:
            head = target.head_function()
            self.draft_caches = CachePool(partial(self._draft_cache, draft, move), self.positions)
            parts = draft_parts(draft, head)
            self._extend, self._step, self._children, self._block = (compiled(part) for part in parts)

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
        """`Target.verify` and `Target.head` for one tree of at most ``largest`` nodes.

        Args:
            tokens, positions: [1, N].
            masks: [1, 1, N, past + N] additive, by type of layer if the model has several.

        Returns:
            hidden states [1, N, H], logits [1, N, V] and what the draft reads, [1, N, F].
        """
        count = tokens.shape[1]
        size = largest if self.graphs and count > 1 else count
        columns = cache.open(size)
        if isinstance(masks, dict):
            padded: LayerMasks = {kind: filled(mask, size, columns) for kind, mask in masks.items() if mask is not None}
        else:
            padded = filled(masks, size, columns)
        rows = padded_rows(tokens[0], size), padded_rows(positions[0], size)
        hidden, logits, features = (part[:, :count] for part in self.verify_nodes(*rows, padded, cache))
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
            tokens: [n]; ``hidden``: [n, F]; ``mask``: [1, 1, n, past + n] additive.
            context: [1, C] of the prompt, if the draft has one.
            rope: of the rows and the padding, [1, 1, S, D] each.

        Returns:
            outputs [n, H].
        """
        count, size = tokens.shape[0], rope[0].shape[2]
        columns = cache.open(size)
        cos, sin = (dynamic(part[0, 0], 0) for part in rope)
        rows = padded_rows(tokens, size), padded_rows(hidden, size)
        output = self._extend(*rows, context, filled(mask, size, columns), cos, sin, cache)
        cache.close(count)
        return output[:count]

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
            tokens: [k]; ``hidden``: [k, H]; ``mask``: [1, 1, k, past + k] additive; ``rope``: [1, 1, 1, D] each.
            context: as in `extend`.

        Returns:
            outputs [k, H], and ids and log-probabilities of the children, [k, k] each.
        """
        width = tokens.shape[0]
        size = max(width, 2)
        columns = cache.open(size)
        cos, sin = (part[0, 0] for part in rope)
        rows = padded_rows(tokens, size), padded_rows(hidden, size)
        output, ids, logprobs = self._step(*rows, context, filled(mask, size, columns), cos, sin, cache)
        cache.close(width)
        return output[:width], ids[:width, :width], logprobs[:width, :width]

    def block(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor], cache: StaticCache, size: int) -> Tensor:
        """A block head's forward over accepted rows and mask rows, padded to ``size``.

        Args:
            x: [n, X]; ``mask``: [1, 1, n, past + n] additive; ``rope``: [1, 1, n, D] each.

        Returns:
            outputs [n, H].
        """
        count, columns = x.shape[0], cache.open(size)
        cos, sin = (padded_rows(part[0, 0], size) for part in rope)
        output = self._block(padded_rows(x, size), filled(mask, size, columns), cos, sin, cache)
        cache.close(count)
        return output[:count]

    def children(self, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities of the ``top_k`` first drafted tokens [k] each, after an output [H]; or [L, k]
        each, after outputs [L, H]."""
        count = max(top_k, 2)
        rows = padded_rows(hidden, max(hidden.shape[0], 2)) if hidden.dim() == 2 else hidden
        ids, logprobs = self._children(rows, dynamic(torch.empty(count, device=hidden.device), 0))
        ids, logprobs = ids[..., :top_k], logprobs[..., :top_k]
        return (ids[: len(hidden)], logprobs[: len(hidden)]) if hidden.dim() == 2 else (ids, logprobs)

    def extended(self, count: int, longest: int) -> int:
        """Rows of the draft's forward over ``count`` accepted ones of at most ``longest``."""
        return longest if self.graphs else max(count, 2)

    def warm_up(self, tree: TreeConfig, positions: int = 1, progress: bool = True) -> None:
        """Compiles all parts, and records all CUDA graphs for requests of ``tree``.

        Args:
            positions: of the longest request, prompt and answer. With CUDA graphs at least `POSITIONS` are recorded.
            progress: show a bar.
        """
        if not self.serves_this_thread():
            return
        cache = self.target_caches.take(positions)
        columns = buckets(cache.capacity) if self.graphs else [bucket(tree.total_tokens)]
        sizes, draft_cache, calls = {1}, None, list[Callable[[], object]]()
        if self.draft is not None:
            cycle = self._new_cycle(self.draft, tree)
            draft_cache = self.draft_caches.take(positions if cycle is None else max(positions, cycle.drafted))
            calls += self._draft_calls(self.draft, draft_cache, tree, columns)
            sizes.add(tree.total_tokens)
            if cycle is not None:
                sizes.add(cycle.nodes)
                calls += cycle.calls(self.target, self.draft, cache, draft_cache, columns)
        calls += self._target_calls(cache, sizes, columns)
        try:
            for call in tqdm(calls, "compiling", unit="part", delay=DELAY, disable=not progress, file=sys.stderr):
                for _ in range(RECORDED if self.graphs else 1):
                    call()
        finally:
            self.target_caches.give_back(cache)
            if draft_cache is not None:
                self.draft_caches.give_back(draft_cache)

    def _new_cycle(self, draft: DraftHead, tree: TreeConfig) -> CompiledCycle | None:
        """Whole cycles with this tree. None if it has no fixed size, or is too deep to be compiled as one function."""
        size = (tree.depth, tree.top_k, tree.total_tokens)
        fixed = not tree.adaptive and tree.top_k <= draft.vocabulary(self.target.vocab_size)
        if not fixed or tree.total_tokens == 1 or tree.depth > DEEPEST:
            return None
        if size not in self._cycles:
            self._cycles[size] = CompiledCycle(self.target, draft, tree, self._compiler, self.verify_nodes)
        return self._cycles[size]

    def cycle(self, tree: TreeConfig) -> CompiledCycle | None:
        """Whole cycles with this tree. None if `warm_up` has not compiled them."""
        return self._cycles.get((tree.depth, tree.top_k, tree.total_tokens))

    def _target_calls(
        self, cache: StaticCache, sizes: Iterable[int], columns: Sequence[int]
    ) -> list[Callable[[], object]]:
        """Verification of trees of ``sizes`` nodes at the end of ``columns``."""
        target, device = self.target, self.target.device

        def verify(size: int, width: int) -> None:
            past, nodes = width - size, torch.arange(size, device=device)[None]  # [1, N]
            cache.truncate([past])
            mask = torch.zeros(1, 1, size, width, dtype=target.dtype, device=device)
            self.verify(nodes * 0, past + nodes, target.masks_by_layer(mask, [past], nodes), cache, size)
            cache.keep([past], [[0, size - 1] if size > 1 else [0]])

        return [partial(verify, size, width) for size in sorted(sizes) for width in columns]

    def _draft_calls(
        self, draft: DraftHead, cache: StaticCache, tree: TreeConfig, columns: Sequence[int]
    ) -> list[Callable[[], object]]:
        """The draft's parts at the end of ``columns``."""
        longest, device, size = tree.depth + 2, draft.device, draft.config.hidden_size
        features = max(len(draft.target_layers), 1) * self.target.hidden_size
        zeros = partial(torch.zeros, dtype=draft.dtype, device=device)

        def inputs(count: int, width: int, each: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
            cache.truncate([width - count])
            tokens = torch.zeros(count, dtype=torch.long, device=device)
            return tokens, zeros(count, each), draft.empty_context(), zeros(1, 1, count, width)

        def rope(count: int) -> tuple[Tensor, Tensor]:
            return draft.rotary(torch.arange(count, device=device)[None], draft.dtype)

        def extend(width: int) -> None:
            self.extend(*inputs(longest, width, features), rope(longest), cache)

        def step(width: int) -> None:
            self.step(*inputs(tree.top_k, width, size), rope(1), cache)

        def block(width: int) -> None:
            rows = longest + tree.depth
            cache.truncate([width - rows])
            x = zeros(rows, draft.fc.out_features)
            self.block(x, zeros(1, 1, rows, width), rope(rows), cache, rows)

        if isinstance(draft, BlockDraft):
            levels = tree.depth + 1
            apart = [levels + 1] if levels == max(tree.top_k, 2) else []  # equal sizes would be compiled as one
            own = [partial(self.children, zeros(count, size), tree.top_k) for count in (*apart, levels)]
            return [*own, *(partial(block, width) for width in columns)]
        calls: list[Callable[[], object]] = [partial(self.children, zeros(size), tree.top_k)]
        return calls + [partial(part, width) for part in (extend, step) for width in columns]

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

    def _target_cache(self, move: Callable[..., None], rows: int) -> StaticCache:
        target = self.target
        return StaticCache(target.cache_shapes, rows, target.dtype, target.device, move, self.graphs)

    def _draft_cache(self, draft: DraftHead, move: Callable[..., None], rows: int) -> StaticCache:
        config = draft.config
        shape = (config.num_key_value_heads, config.head_dim)
        return StaticCache([shape] * len(draft.layers), rows, draft.dtype, draft.device, move, self.graphs)


class StaticDrafter(Drafter):
    """`Drafter` for one sequence on the compiled parts of an engine."""

    def __init__(
        self, engine: StaticEngine, draft: DraftHead, capacity: int, tree: TreeConfig, compression: Compression | None
    ) -> None:
        self._engine = engine
        super().__init__(draft, engine.target.head, capacity, tree, 1, compression)

    def _new_cache(self, batch: int, rows: int) -> KVCache:
        return self._engine.draft_caches.take(rows)

    def leave_compiled(self) -> None:
        """Drafts without the compiled parts from now on."""
        self.cache = self.cache.sequence(0)

    def _read(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        if (cache := self._static_cache) is None:
            return super()._read(tokens, hidden)
        count, engine = tokens.shape[1], self._engine
        mask = self._mask(self._causal[:, :count, :count], [1] * count)
        rope = self._rope(0, engine.extended(count, self._causal.shape[-1]))
        return engine.extend(tokens[0], hidden[0], self._context, mask, rope, cache).unsqueeze(0)

    def _step(
        self, top_k: int, tokens: Tensor, hidden: Tensor, tree_mask: Tensor, widths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (cache := self._static_cache) is None:
            return super()._step(top_k, tokens, hidden, tree_mask, widths)
        mask, rope = self._mask(tree_mask, widths), self._rope(len(widths) - 1, 1)
        parts = self._engine.step(tokens[0], hidden[0], self._context, mask, rope, cache)
        output, ids, logprobs = (part.unsqueeze(0) for part in parts)
        return output, ids, logprobs

    def _children(self, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if self._static_cache is None:
            return super()._children(hidden, top_k)
        ids, logprobs = self._engine.children(hidden[0, 0], top_k)
        return ids[None, None], logprobs[None, None]

    def start_cycles(self, cycle: CompiledCycle, answer: Answer, left: int, cache: StaticCache) -> CycleRun:
        """Whole cycles from here on.

        Args:
            left: new tokens that are still wanted.
            cache: of the target.
        """
        assert isinstance(self.cache, StaticCache)
        (draft_past,), (shift,), past = self._lengths, self._shift, cache.length
        counters = (draft_past, 0, shift, past, int(answer.next_position), left, len(answer.tokens))
        state = cycle.state(self._engine.target, self.draft, counters, answer.tokens[-1])
        return CycleRun(cycle, answer, (cache, self.cache), (past, draft_past), self._ends[0], self._context, state)

    def end_cycles(self, run: CycleRun) -> None:
        """Leaves caches and answer as if all cycles had been decoded without `CycleRun`. Cycles in flight are dropped:
        there are some only if the answer has ended."""
        run.end()
        self._lengths = [run.draft_past]

    @property
    def _ends(self) -> Tensor:
        """What a cycle needs of the newest rows if the last cycle accepted none, [B, `newest_size`]."""
        return self._last

    @property
    def _static_cache(self) -> StaticCache | None:
        return self.cache if isinstance(self.cache, StaticCache) else None


class StaticBlockDrafter(StaticDrafter, BlockDrafter):
    """`BlockDrafter` for one sequence on the compiled parts of an engine."""

    def _forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if (cache := self._static_cache) is None:
            return super()._forward(x, mask, rope)
        size = self._engine.extended(x.shape[1], self._causal.shape[-1] + self._mask_count)
        return self._engine.block(x[0], mask, rope, cache, size)[None]

    def _children(self, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if self._static_cache is None:
            return super()._children(hidden, top_k)
        ids, logprobs = self._engine.children(hidden[0], top_k)
        return ids[None], logprobs[None]

    @property
    def _ends(self) -> Tensor:
        assert self._newest is not None
        return torch.cat([self._last, self._newest], dim=-1)


def filled(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Pads an additive mask [1, 1, n, w] to [1, 1, rows, columns]. New columns are masked. A new row sees what the
    first one sees, because a row that sees nothing may give NaN."""
    count, width = mask.shape[2:]
    full = mask.new_full((1, 1, rows, columns), torch.finfo(mask.dtype).min)
    full[:, :, :count, :width] = mask
    full[:, :, count:, :width] = mask[:, :, :1]
    return dynamic(full, 2, 3)


def padded_rows(values: Tensor, rows: int) -> Tensor:
    """Appends zeros to ``values`` [n] or [n, H] until there are so many rows."""
    missing = rows - values.shape[0]
    full = F.pad(values, (0, missing) if values.dim() == 1 else (0, 0, 0, missing))
    return dynamic(full.contiguous(), 0)


def verifier(target: Target, layers: Sequence[int]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The forward of `StaticEngine.verify`, as a function to compile. ``layers``: whose streams the draft reads."""
    text_model, read = target.text_model, target.token_reader()
    head, cache_argument = target.head_function(), target.cache_argument

    def forward(tokens: Tensor, positions: Tensor, mask: LayerMasks, cache: StaticCache) -> Tensor:
        given: dict[str, Any] = {cache_argument: cache, **read(tokens[None])}
        own_positions = target.text_positions(positions[None])
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
        x = draft.text_rows(hidden, tokens[None], context)  # [1, n, X]
        return draft(x, None, mask, cache, (cos, sin))[0]

    def extend(tokens: Tensor, features: Tensor, *rest: Any) -> Tensor:
        return forward(tokens, draft.condense(features[None]), *rest)

    def step(tokens: Tensor, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = forward(tokens, hidden[None], *rest)  # [k, H]
        return output, *draft.likely_next(output, tokens.shape[0], head)

    def children(hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return draft.likely_next(hidden, places.shape[0], head)

    def block(x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
        return draft(x[None], None, mask, cache, (cos, sin))[0]

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

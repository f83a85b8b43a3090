"""Whole cycles of one sequence, for trees of one size, that need no value from the host.

What a cycle depends on is on the device (`State`). So the host launches four functions, each compiled once, and the
choice of tokens, and then waits for nothing but the tokens of the cycle before:

==========  ==================================================================================================
function    work
==========  ==================================================================================================
draft       reads the rows that the last cycle accepted, drafts all levels, selects the nodes of the tree
masks       of the verification
verify      `StaticEngine.verify_nodes`, which other requests use too
finish      accepts, keeps the accepted rows of the cache, and prepares the next cycle and the result
==========  ==================================================================================================

Rows that a cycle accepts are padded to as many as it can accept. Draft and verification have functions of their own
because the columns of their caches grow at different times. Tokens are chosen in between, without compiling, so that
settings of sampling are not compiled as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle.decode.accept import NO_TOKEN, accepted_nodes
from eagle.decode.block import block_layout, block_levels, with_mask_rows
from eagle.decode.compiled.static_cache import StaticCache, bucket
from eagle.decode.drafter import depths_of, draft_levels
from eagle.decode.masks import mask_behind
from eagle.decode.sequence import Sequence as Answer
from eagle.decode.stats import Stats
from eagle.decode.tree import Candidates, DraftTree, select_nodes
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.block import BlockDraft
from eagle.drafts.head import DraftHead
from eagle.families.base import LayerMasks, Target, within_window


class Counters(NamedTuple):
    """What the host knows on other paths, each a tensor without dimensions.

    ``draft_past``: cached rows of the draft, without the ``accepted`` ones of the last cycle; ``shift``:
    position minus row of new tokens there; ``past``: cached rows of the target; ``position``: of the root; ``left``:
    tokens that are still wanted; ``answered``: new tokens so far.
    """

    draft_past: Tensor
    accepted: Tensor
    shift: Tensor
    past: Tensor
    position: Tensor
    left: Tensor
    answered: Tensor


class State(NamedTuple):
    """What a cycle starts from.

    ``tokens`` [P]: what follows the rows that the last cycle accepted; the last of them is the root. ``features``
    [P, F]: the target's features in these rows. ``counters`` [7]: `Counters`. Before the first cycle nothing was
    accepted: the root is the first token.
    """

    tokens: Tensor
    features: Tensor
    counters: Tensor


class PlacedRows:
    """A cache of the draft for one forward, which writes its rows at ``places`` [n] and sees the window's columns."""

    def __init__(self, cache: StaticCache, places: Tensor) -> None:
        self.cache, self.places = cache, places

    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Writes rows [1, heads, n, head_dim]; returns the columns that are seen."""
        return self.cache.layers[index].write(self.places, keys, values)


class CompiledCycle:
    """The functions of one tree.

    Args:
        tree: not adaptive, with at least one drafted node.
        compiled: compiles a function.
        verify: `StaticEngine.verify_nodes`.
    """

    def __init__(
        self,
        target: Target,
        draft: DraftHead,
        tree: TreeConfig,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
        verify: Callable[..., Any],
    ) -> None:
        self.tree, self.nodes = tree, tree.nodes_within(tree.depth + 2)
        self.longest = min(tree.depth + 2, self.nodes)  # rows that a cycle can accept
        self.drafted = max(tree.depth * tree.top_k, self.longest)  # rows that the draft writes behind accepted ones
        if isinstance(draft, BlockDraft):
            self.drafted = self.longest + tree.depth
        self.ahead = 1 if target.device.type == "cuda" else 0  # cycles that are launched before a result is looked at
        head = target.head_function()

        def draft_phase(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
            return draft_tree(draft, head, tree, *given)

        def masks(*given: Any) -> LayerMasks:
            return verification_masks(target, *given)

        def finish(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return finish_cycle(longest, *given)

        longest, self.verify = self.longest, verify
        self.draft, self.masks, self.finish = (compiled(part) for part in (draft_phase, masks, finish))

    def calls(
        self, target: Target, draft: DraftHead, cache: StaticCache, draft_cache: StaticCache, columns: Sequence[int]
    ) -> list[Callable[[], object]]:
        """Calls that compile the functions, for caches of so many ``columns``; `verify` has its own."""
        draft.rotary(torch.zeros(1, 1, device=draft.device), draft.dtype)  # its frequencies are float32 from now on
        state = self.state(target, draft)
        last = torch.zeros(newest_size(draft), dtype=draft.dtype, device=draft.device)

        def drafts(width: int) -> tuple[Tensor, Tensor, Tensor]:
            draft_cache.set_columns(max(width, bucket(self.drafted)))  # no cycle sees fewer
            return self.draft(*state, last, draft.empty_context(), draft_cache)

        def masks(width: int) -> None:
            cache.set_columns(width)
            self.masks(*drafts(columns[0]), cache)

        def finish() -> None:
            nodes, tree_mask, counters = drafts(columns[0])
            hidden = torch.zeros(self.nodes, target.hidden_size, dtype=target.dtype, device=target.device)
            features = hidden.repeat(1, max(len(draft.target_layers), 1))
            self.finish(nodes, tree_mask, nodes[0], hidden, features, counters, cache)

        return [*(partial(drafts, width) for width in columns), *(partial(masks, width) for width in columns), finish]

    def state(self, target: Target, draft: DraftHead, counters: Sequence[int] = (0,) * 7, token: int = 0) -> State:
        """The state before the first cycle."""
        width = max(len(draft.target_layers), 1) * target.hidden_size
        return State(
            torch.full((self.longest,), token, device=target.device),
            torch.zeros(self.longest, width, dtype=target.dtype, device=target.device),
            torch.tensor(counters, device=target.device),
        )


class Result:
    """The tokens of a cycle on their way to the host. On CUDA the copy does not wait for the device.

    Args:
        values: [P + 1] padded tokens and their number.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tokens(self) -> list[int]:
        """Waits for the cycle, the only time that the host does."""
        if self._event is not None:
            self._event.synchronize()
        *tokens, count = self._values.tolist()
        return tokens[:count]


class CycleRun:
    """Consecutive whole cycles of a request.

    Args:
        last: [H] what the draft predicts after its accepted rows; of a block head [H + X], with the newest row's input.
        context: [1, C] of the prompt, if the draft has one.
        state: before the first cycle; its rows are ``past`` in the target and ``draft_past`` in the draft.
    """

    def __init__(
        self,
        cycle: CompiledCycle,
        answer: Answer,
        caches: tuple[StaticCache, StaticCache],
        rows: tuple[int, int],
        last: Tensor,
        context: Tensor | None,
        state: State,
    ) -> None:
        self.cycle, self.answer, self.sampler, self.state = cycle, answer, answer.sampler, state
        self.target_cache, self.draft_cache = caches
        self.past, self.draft_past = rows
        self._first = self.past
        self.accepted = 0  # of the last cycle that the host has seen: rows that the draft has not read yet
        self._last, self._context = last, context
        self.flights: list[Result] = []

    def most(self, limit: int) -> tuple[int, int]:
        """The most rows of target and draft that can be in use when the next cycle starts, if there are never more than
        ``limit`` in the target."""
        past = min(self.past + len(self.flights) * self.cycle.longest, limit)
        return past, self.draft_past + self.accepted + past - self.past

    def launch(self, most: tuple[int, int], stats: Stats) -> bool:
        """Launches the next cycle.

        Args:
            most: rows in use of target and draft, at most.
        """
        cycle, cache = self.cycle, self.target_cache
        with stats.phase("draft"):
            self.draft_cache.set_columns(bucket(most[1] + cycle.drafted))
            nodes, tree_mask, counters = cycle.draft(*self.state, self._last, self._context, self.draft_cache)
        with stats.phase("verify"):
            cache.set_columns(bucket(most[0] + cycle.nodes))
            masks = cycle.masks(nodes, tree_mask, counters, cache)
            tokens, positions, cache.window.places, _, depths = nodes.unbind()
            hidden, logits, features = (part[0] for part in cycle.verify(tokens, positions, masks, cache))
        with stats.phase("accept"):
            chosen = self.sampler.sample(logits, self.answer.prompt, self._noise(depths, counters, logits.shape[-1]))
            *state, result = cycle.finish(nodes, tree_mask, chosen, hidden, features, counters, cache)
            self.state = State(*state)
            self.flights.append(Result(result))
        return True

    def wait(self) -> list[int]:
        """The tokens of the oldest cycle in flight."""
        tokens = self.flights.pop(0).tokens()
        self.past, self.draft_past, self.accepted = (
            self.past + len(tokens),
            self.draft_past + self.accepted,
            len(tokens),
        )
        return tokens

    def ahead(self, asynchronous: bool) -> int:
        """Cycles that are launched before a result is looked at; none if phases are to be measured exactly."""
        return self.cycle.ahead if asynchronous else 0

    def end(self) -> None:
        """`StaticDrafter.end_cycles`, but for the drafter itself."""
        self.target_cache.truncate([self.past])
        self.draft_cache.truncate([self.draft_past])
        if self.answer.finished:
            return
        self.answer.next_position = self.answer.next_position + (self.past - self._first)
        if self.accepted:
            tokens = torch.tensor(self.answer.tokens[-self.accepted :])
            self.answer.add_pending(self.state.features[: self.accepted], tokens)

    def _noise(self, depths: Tensor, counters: Tensor, vocabulary: int) -> Tensor | None:
        """[N, V] noise for the token that follows each node. None for greedy decoding. Cycles in flight may have added
        tokens that the host does not know, so more is drawn than this cycle needs."""
        if not self.sampler.do_sample:
            return None
        known, ahead = len(self.answer.tokens), (len(self.flights) + 1) * self.cycle.longest
        rows = self.answer.noise.rows(known, ahead, vocabulary)
        place = depths + (counters[Counters._fields.index("answered")] - known)
        return rows[place.clamp(max=ahead - 1)]  # nodes deeper than wanted are never accepted


def newest_size(draft: DraftHead) -> int:
    """Values that a cycle needs of the newest row if the last cycle accepted none."""
    return draft.config.hidden_size + (draft.fc.out_features if isinstance(draft, BlockDraft) else 0)


def drafted_block(
    draft: BlockDraft,
    head: Callable[[Tensor], Tensor],
    tree: TreeConfig,
    tokens: Tensor,
    features: Tensor,
    counters: Tensor,
    last: Tensor,
    cache: StaticCache,
) -> list[Candidates]:
    """The levels of a block head, by one forward over accepted rows and mask rows."""
    known, count = Counters(*counters.unbind()), tokens.shape[0]
    rows = draft.text_rows(draft.condense(features[None]), tokens[None])  # [1, P, X]
    output, newest = last[None].split([draft.config.hidden_size, rows.shape[-1]], dim=-1)  # [1, H], [1, X]
    has, end = known.accepted > 0, (known.accepted - 1).clamp(min=0)[None]
    newest = torch.where(has, rows[:, end][:, 0], newest)
    x = with_mask_rows(draft, rows, newest, tree.depth)  # [1, P + m, X]
    visible, offsets = block_layout(known.accepted[None], count, tree.depth)
    mask = mask_behind(known.draft_past[None], visible, cache.window.columns.shape[0], draft.dtype)
    places: Any = PlacedRows(cache, known.draft_past + torch.arange(x.shape[1], device=x.device))
    rope = draft.rotary(known.draft_past + known.shift + offsets, draft.dtype)
    outputs = draft(x, None, mask, places, rope)  # [1, P + m, H]
    first = torch.where(has, outputs[:, end], output[:, None])
    drafted = torch.cat([first, outputs[:, count:]], dim=1)  # [1, levels, H]
    return block_levels(*draft.likely_next(drafted, tree.top_k, head), tree.top_k)


def drafted_levels(
    draft: DraftHead,
    head: Callable[[Tensor], Tensor],
    tree: TreeConfig,
    tokens: Tensor,
    features: Tensor,
    counters: Tensor,
    last: Tensor,
    context: Tensor | None,
    cache: StaticCache,
) -> list[Candidates]:
    """The levels of another head, by one forward each."""
    known = Counters(*counters.unbind())
    device, count = tokens.device, tokens.shape[0]

    def forward(
        hidden: Tensor, own: Tensor, block: Tensor, widths: Sequence[int], draft_past: Tensor, positions: Tensor
    ) -> Tensor:
        """Predicted hidden states [1, n, H] of rows behind ``draft_past`` ones; a single position serves all."""
        mask = mask_behind(draft_past[None], block, cache.window.columns.shape[0], draft.dtype)
        if draft.window is not None:
            mask = within_window(mask, draft_past[None], depths_of(widths, device)[None], draft.window)
        start = sum(widths) - own.shape[1]
        rows: Any = PlacedRows(cache, draft_past + torch.arange(start, start + own.shape[1], device=device))
        x = draft.text_rows(hidden, own, context)  # [1, n, X]
        return draft(x, None, mask, rows, draft.rotary(positions[None], draft.dtype))

    causal = torch.ones(1, count, count, dtype=torch.bool, device=device).tril()
    positions = known.draft_past + known.shift + torch.arange(count, device=device)
    output = forward(draft.condense(features[None]), tokens[None], causal, [1] * count, known.draft_past, positions)
    newest = (known.accepted - 1).clamp(min=0)[None]
    last = torch.where(known.accepted > 0, output[:, newest], last)  # [1, 1, H]
    draft_past = known.draft_past + known.accepted

    def step(own: Tensor, hidden: Tensor, tree_mask: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        position = (draft_past + known.shift + (len(widths) - 1))[None]
        output = forward(hidden, own, tree_mask, widths, draft_past, position)
        return output, *draft.likely_next(output, tree.top_k, head)

    return draft_levels(draft.likely_next(last, tree.top_k, head), last, tree, step)


def draft_tree(
    draft: DraftHead,
    head: Callable[[Tensor], Tensor],
    tree: TreeConfig,
    tokens: Tensor,
    features: Tensor,
    counters: Tensor,
    last: Tensor,
    context: Tensor | None,
    cache: StaticCache,
) -> tuple[Tensor, Tensor, Tensor]:
    """The draft phase: nodes [5, N] (token, position, row in the target's cache, parent, depth), which of them each
    sees [N, N], and the new counters. Levels deeper than the tokens that are still wanted have no probability."""
    known, device = Counters(*counters.unbind()), tokens.device
    if isinstance(draft, BlockDraft):
        levels = drafted_block(draft, head, tree, tokens, features, counters, last, cache)
    else:
        levels = drafted_levels(draft, head, tree, tokens, features, counters, last, context, cache)
    newest = (known.accepted - 1).clamp(min=0)[None]
    scores = [torch.where(known.left > level + 1, part.scores[0], -torch.inf) for level, part in enumerate(levels)]
    candidates = Candidates(
        torch.cat([part.tokens[0] for part in levels]),
        torch.cat(scores),
        torch.cat([part.parents[0] for part in levels]),
    )
    drafted = select_nodes(candidates, tokens.index_select(0, newest), tree.total_tokens, tree.depth + 1)
    rows = known.past + torch.arange(drafted.size, device=device)
    nodes = [drafted.tokens, known.position + drafted.depths, rows, drafted.parents, drafted.depths]
    return torch.stack(nodes), drafted.mask, torch.stack([known.draft_past + known.accepted, *known[1:]])


def verification_masks(
    target: Target, nodes: Tensor, tree_mask: Tensor, counters: Tensor, cache: StaticCache
) -> LayerMasks:
    """The masks of `StaticEngine.verify_nodes`, for ``nodes`` [5, N] and ``tree_mask`` [N, N] of `draft_tree`."""
    past = Counters(*counters.unbind()).past[None]
    mask = mask_behind(past, tree_mask[None], cache.window.columns.shape[0], target.dtype)
    return target.masks_by_layer(mask, past, nodes[4:])


def finish_cycle(
    longest: int,
    nodes: Tensor,
    tree_mask: Tensor,
    chosen: Tensor,
    hidden: Tensor,
    features: Tensor,
    counters: Tensor,
    cache: StaticCache,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Acceptance and what follows from it: the next `State`, and the values of `Result`.

    Args:
        chosen: [N] the target's choice at each node; ``hidden`` [N, H]; ``features`` [N, F].
    """
    tokens, _, rows, parents, depths = nodes.unbind()
    known = Counters(*counters.unbind())
    chosen = chosen.masked_fill(hidden.isnan().any(dim=-1), NO_TOKEN)
    tree = DraftTree(tokens, parents, depths, tree_mask, depths)
    accepted = accepted_nodes(tree, chosen) & ((depths < known.left) | (depths == 0))  # [N]
    size = tokens.shape[0]
    order = torch.where(accepted, torch.arange(size, device=tokens.device), size)
    path = order.sort().values[:longest].clamp(max=size - 1)  # [P], padded with the last node
    source = known.past + path
    for layer in cache.layers:
        for store in (layer.store_k, layer.store_v):
            store.index_copy_(2, rows[:longest], store.index_select(2, source))
    count, added = accepted.sum(), chosen[path]
    following = Counters(
        draft_past=known.draft_past,
        accepted=count,
        shift=known.shift,
        past=known.past + count,
        position=known.position + count,
        left=known.left - count,
        answered=known.answered + count,
    )
    result = torch.cat([added, count[None]])
    return added.clamp(min=0), features[path], torch.stack(following), result

"""Whole cycles of a single sequence or a batch, for trees of one size, that need no value from the host.

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

Sequences have slots (`eagle.decode.compiled.static_cache`), S in all; what a slot without a sequence gives is ignored.
When a sequence of a batch ends, the host waits for the cycles in flight and starts again with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle.decode.accept import NO_TOKEN, accepted_nodes
from eagle.decode.block import block_layout, block_levels, with_mask_rows
from eagle.decode.compiled.static_cache import StaticCache, bucket, dynamic, move_rows, padded
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
    """What the host knows on other paths, [S] each.

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

    ``tokens`` [S, P]: what follows the rows that the last cycle accepted; the last of them is the root. ``features``
    [S, P, F]: the target's features in these rows. ``counters`` [7, S]: `Counters`. Before the first cycle nothing was
    accepted: the root is the first token.
    """

    tokens: Tensor
    features: Tensor
    counters: Tensor


class PlacedRows:
    """A cache of the draft for one forward, which writes its rows at ``places`` [S, n] and sees the window's
    columns."""

    def __init__(self, cache: StaticCache, places: Tensor) -> None:
        self.cache, self.places = cache, places

    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Writes rows [S, heads, n, head_dim]; returns the columns that are seen."""
        return self.cache.layers[index].write(self.places, keys, values)


class CompiledCycle:
    """The functions of one tree.

    Args:
        tree: not adaptive, with at least one drafted node.
        compiled: compiles a function.
        verify: `StaticEngine.verify_nodes`.

    Attributes:
        compiled_for: 1 for single sequences, 2 for batches.
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
        self.compiled_for: set[int] = set()
        self.draft, self.masks, self.finish = (compiled(part) for part in (draft_phase, masks, finish))

    def calls(
        self,
        target: Target,
        draft: DraftHead,
        caches: tuple[StaticCache, StaticCache],
        columns: tuple[Sequence[int], Sequence[int]],
        sequences: int,
    ) -> list[Callable[[], object]]:
        """Calls that compile the functions for so many sequences, for ``caches`` of target and draft with so many
        ``columns``; `verify` has its own."""
        self.compiled_for.add(min(sequences, 2))
        draft.rotary(torch.zeros(1, 1, device=draft.device), draft.dtype)  # its frequencies are float32 from now on
        (cache, draft_cache), (own_columns, draft_columns) = caches, columns

        def drafts(width: int) -> list[Tensor]:
            cache.start(sequences)
            draft_cache.start(sequences)
            slots, empty = cache.slots, draft.empty_context()
            draft_cache.set_columns(max(width, bucket(self.drafted)))  # no cycle sees fewer
            tokens, features, counters = self.state(target, draft, slots)
            last = torch.zeros(slots, newest_size(draft), dtype=draft.dtype, device=draft.device)
            context = None if empty is None else padded(empty.expand(slots, -1), slots)
            state = dynamic(tokens, 0), dynamic(features, 0), dynamic(counters, 1)
            nodes, mask, counters = self.draft(*state, dynamic(last, 0), context, draft_cache)
            return [dynamic(nodes, 1), dynamic(mask, 0), dynamic(counters, 1)]

        def masks(width: int) -> None:
            made = drafts(draft_columns[0])
            cache.set_columns(width)
            self.masks(*made, cache)

        def finish() -> None:
            nodes, tree_mask, counters = drafts(draft_columns[0])
            hidden = torch.zeros(cache.slots, self.nodes, target.hidden_size, dtype=target.dtype, device=target.device)
            features = dynamic(hidden.repeat(1, 1, max(len(draft.target_layers), 1)), 0)
            self.finish(nodes, tree_mask, dynamic(nodes[0].clone(), 0), dynamic(hidden, 0), features, counters, cache)

        return [
            *(partial(drafts, width) for width in draft_columns),
            *(partial(masks, width) for width in own_columns),
            finish,
        ]

    def state(
        self,
        target: Target,
        draft: DraftHead,
        slots: int,
        counters: Sequence[Sequence[int]] = (),
        tokens: Sequence[int] = (),
    ) -> State:
        """The state before the first cycle of sequences with these `Counters` and newest ``tokens``."""
        rest, device = slots - len(tokens), target.device
        width = max(len(draft.target_layers), 1) * target.hidden_size
        rows = [[token] * self.longest for token in (*tokens, *[0] * rest)]
        known = [*counters, *[(0,) * len(Counters._fields)] * rest]
        return State(
            torch.tensor(rows, device=device),
            torch.zeros(slots, self.longest, width, dtype=target.dtype, device=device),
            torch.tensor(list(zip(*known, strict=True)), device=device),
        )


class Result:
    """The tokens of a cycle on their way to the host. On CUDA the copy does not wait for the device.

    Args:
        values: [S, P + 1] padded tokens and their number.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tokens(self) -> list[list[int]]:
        """Waits for the cycle, the only time that the host does."""
        if self._event is not None:
            self._event.synchronize()
        return [tokens[:count] for *tokens, count in self._values.tolist()]


class CycleRun:
    """Consecutive whole cycles of a request.

    Args:
        last: [S, H] what the draft predicts after its accepted rows; of a block head [S, H + X], with the newest row's
            input.
        context: [S, C] of the prompts, if the draft has one.
        state: before the first cycle; the rows of each answer are ``rows`` in target and draft.
    """

    def __init__(
        self,
        cycle: CompiledCycle,
        answers: Sequence[Answer],
        caches: tuple[StaticCache, StaticCache],
        rows: tuple[Sequence[int], Sequence[int]],
        last: Tensor,
        context: Tensor | None,
        state: State,
    ) -> None:
        self.cycle, self.answers, self.state = cycle, list(answers), state
        self.sampler, self.prompt = answers[0].sampler, answers[0].prompt
        self.target_cache, self.draft_cache = caches
        self.past, self.draft_past = (list(part) for part in rows)
        self._first = self.past
        self.accepted = [0] * len(self.answers)  # of the last cycle that the host has seen: the draft has not read them
        self._last, self._context = last, context
        self.flights: list[Result] = []

    def most(self, limit: int) -> tuple[int, int]:
        """The most rows of target and draft that can be in use when the next cycle starts, if there are never more than
        ``limit`` in the target."""
        past = [min(rows + len(self.flights) * self.cycle.longest, limit) for rows in self.past]
        behind = zip(self.draft_past, self.accepted, past, self.past, strict=True)
        return max(past), max(rows + accepted + most - known for rows, accepted, most, known in behind)

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
            hidden, logits, features = cycle.verify(tokens, positions, masks, cache)
            features = features.view(features.shape)  # arguments that are one object would be compiled again
        with stats.phase("accept"):
            chosen = self._choices(logits, depths, counters)
            *state, result = cycle.finish(nodes, tree_mask, chosen, hidden, features, counters, cache)
            self.state = State(*state)
            self.flights.append(Result(result))
        return True

    def wait(self) -> list[list[int]]:
        """The tokens of the oldest cycle in flight."""
        tokens = self.flights.pop(0).tokens()[: len(self.answers)]
        added = [len(own) for own in tokens]
        self.draft_past = [rows + read for rows, read in zip(self.draft_past, self.accepted, strict=True)]
        self.past = [rows + own for rows, own in zip(self.past, added, strict=True)]
        self.accepted = added
        return tokens

    def ahead(self, asynchronous: bool) -> int:
        """Cycles that are launched before a result is looked at; none if phases are to be measured exactly."""
        return self.cycle.ahead if asynchronous else 0

    def end(self) -> None:
        """`StaticDrafter.end_cycles`, but for the drafter itself."""
        self.target_cache.truncate(self.past)
        self.draft_cache.truncate(self.draft_past)
        for index, answer in enumerate(self.answers):
            if answer.finished:
                continue
            answer.next_position = answer.next_position + (self.past[index] - self._first[index])
            if count := self.accepted[index]:
                tokens = torch.tensor(answer.tokens[-count:])
                answer.add_pending(self.state.features[index, :count], tokens)

    def _choices(self, logits: Tensor, depths: Tensor, counters: Tensor) -> Tensor:
        """The target's choice [S, N] at each node, from its logits [S, N, V]; 0 in slots without a sequence."""
        batch, slots = len(self.answers), depths.shape[0]
        noise = self._noise(depths, counters, logits.shape[-1])
        own = logits if batch == slots else logits[:batch]
        chosen = self.sampler.sample(own.flatten(0, 1), self.prompt, noise).view(batch, -1)
        return chosen if batch == slots else F.pad(chosen, (0, 0, 0, slots - batch))

    def _noise(self, depths: Tensor, counters: Tensor, vocabulary: int) -> Tensor | None:
        """[B * N, V] noise for the token that follows each node. None for greedy decoding. Cycles in flight may have
        added tokens that the host does not know, so more is drawn than this cycle needs."""
        if not self.sampler.do_sample:
            return None
        ahead, parts = (len(self.flights) + 1) * self.cycle.longest, []
        answered = counters[Counters._fields.index("answered")].unbind()
        for answer, own, count in zip(self.answers, depths.unbind(), answered, strict=False):
            known = len(answer.tokens)
            place = own + (count - known)
            # nodes deeper than wanted are never accepted, and what follows the end of an answer is dropped
            parts.append(answer.noise.rows(known, ahead, vocabulary)[place.clamp(max=ahead - 1)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    known, count = Counters(*counters.unbind()), tokens.shape[1]
    rows = draft.text_rows(draft.condense(features), tokens)  # [S, P, X]
    output, newest = last.split([draft.config.hidden_size, rows.shape[-1]], dim=-1)  # [S, H], [S, X]
    has, slots, end = known.accepted > 0, cache.window.slots[:, 0], (known.accepted - 1).clamp(min=0)  # [S] each
    newest = torch.where(has.unsqueeze(1), rows[slots, end], newest)
    x = with_mask_rows(draft, rows, newest, tree.depth)  # [S, P + m, X]
    visible, offsets = block_layout(known.accepted, count, tree.depth)
    mask = mask_behind(known.draft_past, visible, cache.window.columns.shape[0], draft.dtype)
    places: Any = PlacedRows(cache, known.draft_past.unsqueeze(1) + torch.arange(x.shape[1], device=x.device))
    rope = draft.rotary((known.draft_past + known.shift).unsqueeze(1) + offsets, draft.dtype)
    outputs = draft(x, None, mask, places, rope)  # [S, P + m, H]
    first = torch.where(has.unsqueeze(1), outputs[slots, end], output)
    drafted = torch.cat([first.unsqueeze(1), outputs[:, count:]], dim=1)  # [S, levels, H]
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
    device, (slots, count) = tokens.device, tokens.shape

    def forward(
        hidden: Tensor, own: Tensor, block: Tensor, widths: Sequence[int], draft_past: Tensor, positions: Tensor
    ) -> Tensor:
        """Predicted hidden states [S, n, H] of rows behind ``draft_past`` ones; a single position serves all."""
        mask = mask_behind(draft_past, block, cache.window.columns.shape[0], draft.dtype)
        if draft.window is not None:
            mask = within_window(mask, draft_past, depths_of(widths, device).expand(slots, -1), draft.window)
        start = sum(widths) - own.shape[1]
        places = draft_past.unsqueeze(1) + torch.arange(start, start + own.shape[1], device=device)
        rows: Any = PlacedRows(cache, places)
        x = draft.text_rows(hidden, own, context)  # [S, n, X]
        return draft(x, None, mask, rows, draft.rotary(positions, draft.dtype))

    causal = torch.ones(count, count, dtype=torch.bool, device=device).tril().expand(slots, -1, -1)
    positions = (known.draft_past + known.shift).unsqueeze(1) + torch.arange(count, device=device)
    output = forward(draft.condense(features), tokens, causal, [1] * count, known.draft_past, positions)
    newest = (known.accepted - 1).clamp(min=0).unsqueeze(1)  # [S, 1]
    accepted = (known.accepted > 0)[:, None, None]
    last = torch.where(accepted, output[cache.window.slots, newest], last.unsqueeze(1))  # [S, 1, H]
    draft_past = known.draft_past + known.accepted

    def step(own: Tensor, hidden: Tensor, tree_mask: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        position = (draft_past + known.shift + (len(widths) - 1)).unsqueeze(1)
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
    """The draft phase: nodes [5, S, N] (token, position, row in the target's cache, parent, depth), which of them each
    sees [S, N, N], and the new counters. Levels deeper than the tokens that are still wanted have no probability."""
    known, device = Counters(*counters.unbind()), tokens.device
    if isinstance(draft, BlockDraft):
        levels = drafted_block(draft, head, tree, tokens, features, counters, last, cache)
    else:
        levels = drafted_levels(draft, head, tree, tokens, features, counters, last, context, cache)
    newest = (known.accepted - 1).clamp(min=0).unsqueeze(1)  # [S, 1]
    left = known.left.unsqueeze(1)
    candidates = Candidates(
        torch.cat([part.tokens for part in levels], dim=1),
        torch.cat([torch.where(left > level + 1, part.scores, -torch.inf) for level, part in enumerate(levels)], dim=1),
        torch.cat([part.parents for part in levels], dim=1),
    )
    drafted = select_nodes(candidates, tokens.gather(1, newest), tree.total_tokens, tree.depth + 1)
    rows = known.past.unsqueeze(1) + torch.arange(drafted.size, device=device)
    nodes = [drafted.tokens, known.position.unsqueeze(1) + drafted.depths, rows, drafted.parents, drafted.depths]
    return torch.stack(nodes), drafted.mask, torch.stack([known.draft_past + known.accepted, *known[1:]])


def verification_masks(
    target: Target, nodes: Tensor, tree_mask: Tensor, counters: Tensor, cache: StaticCache
) -> LayerMasks:
    """The masks of `StaticEngine.verify_nodes`, for ``nodes`` [5, S, N] and ``tree_mask`` [S, N, N] of `draft_tree`."""
    past = Counters(*counters.unbind()).past
    mask = mask_behind(past, tree_mask, cache.window.columns.shape[0], target.dtype)
    return target.masks_by_layer(mask, past, nodes[4])


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
        chosen: [S, N] the target's choice at each node; ``hidden`` [S, N, H]; ``features`` [S, N, F].
    """
    tokens, _, rows, parents, depths = nodes.unbind()
    known = Counters(*counters.unbind())
    chosen = chosen.masked_fill(hidden.isnan().any(dim=-1), NO_TOKEN)
    tree = DraftTree(tokens, parents, depths, tree_mask, depths)
    accepted = accepted_nodes(tree, chosen) & ((depths < known.left.unsqueeze(1)) | (depths == 0))  # [S, N]
    size = tokens.shape[1]
    order = torch.where(accepted, torch.arange(size, device=tokens.device), size)
    path = order.sort(dim=1).values[:, :longest].clamp(max=size - 1)  # [S, P], padded with the last node
    move_rows(cache, known.past.unsqueeze(1) + path, rows[:, :longest])
    count, added = accepted.sum(dim=1), chosen.gather(1, path)
    following = Counters(
        draft_past=known.draft_past,
        accepted=count,
        shift=known.shift,
        past=known.past + count,
        position=known.position + count,
        left=known.left - count,
        answered=known.answered + count,
    )
    result = torch.cat([added, count.unsqueeze(1)], dim=1)
    return added.clamp(min=0), features[cache.window.slots, path], torch.stack(following), result

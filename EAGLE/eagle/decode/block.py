"""Grows the trees of block heads (`eagle.drafts.block`): one forward drafts all levels.

Mask rows are read together with the rows that were accepted, and leave the cache with the end of that forward. What a
mask row drafts does not depend on the tokens before it, so all nodes of a level have the same children. A node's score
is the sum of the log-probabilities of its path, as in other trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eagle.decode.assistant import AssistantDrafter
from eagle.decode.drafter import Drafter, at_ends
from eagle.decode.tree import Candidates
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.assistant import AssistantDraft
from eagle.drafts.block import BlockDraft
from eagle.drafts.head import DraftHead
from eagle.kv_cache import KVCache


class BlockDrafter(Drafter):
    """`Drafter` for a block head. Trees have at most as many levels as it drafts."""

    draft: BlockDraft

    def __init__(
        self, draft: BlockDraft, head: Callable[[Tensor], Tensor], capacity: int, tree: TreeConfig, *more: Any
    ) -> None:
        super().__init__(draft, head, capacity, tree, *more)
        self._mask_count = min(draft.block_size - 1, tree.depth)
        self._newest: Tensor | None = None  # [B, X] input of each prompt's last row
        self._drafted: Tensor | None = None  # [B, levels, H] outputs of the newest rows and the mask rows behind them

    def _read_prompt(self, index: int, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self._newest is None:
            self._newest = x.new_zeros(len(self._lengths), x.shape[-1])
        self._newest[index], self._drafted = x[0, -1], None
        return super()._read_prompt(index, x, mask, rope)

    def _read_accepted(self, tokens: Tensor, hidden: Tensor, counts: Sequence[int]) -> Tensor:
        rows = self.draft.text_rows(hidden, tokens)  # [B, n, X]
        self._newest = at_ends(rows, counts)
        output = self._read_with_masks(rows, counts, self._newest)
        newest, behind = at_ends(output, counts), output[:, rows.shape[1] :]
        self._drafted = torch.cat([newest.unsqueeze(1), behind], dim=1)
        return newest

    def _read_with_masks(self, rows: Tensor, counts: Sequence[int], newest: Tensor) -> Tensor:
        """One forward over accepted rows and mask rows, [B, n + m, H].

        Args:
            rows: [B, n, X], of which each sequence has ``counts``; n may be 0.
            newest: [B, X] the newest row of each sequence.
        """
        x = with_mask_rows(self.draft, rows, newest, self._mask_count)  # [B, n + m, X]
        own, lengths, shift = torch.tensor([counts, self._lengths, self._shift], device=rows.device)  # [B] each
        visible, offsets = block_layout(own, rows.shape[1], self._mask_count)
        mask = self._mask(visible, [1] * x.shape[1])
        return self._forward(x, mask, self._angles((lengths + shift).unsqueeze(1) + offsets))

    def _forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The draft's outputs [B, n, H] of rows [B, n, X]."""
        return self.draft(x, None, mask, self.cache, rope)

    def expand(self, tree: TreeConfig, should_deepen: Callable[[Tensor], bool] | None = None) -> Candidates:
        """As `Drafter.expand`, but ``should_deepen`` is not asked: further levels cost no forward."""
        if self._drafted is None:  # nothing was accepted since the prompts
            self._drafted = self._last.unsqueeze(1)
            if self._mask_count:
                assert self._newest is not None
                behind = self._read_with_masks(self._newest[:, None][:, :0], [0] * len(self._newest), self._newest)
                self._drafted = torch.cat([self._drafted, behind], dim=1)
                self.cache.truncate(self._lengths)
        ids, logprobs = (part[:, : tree.depth + 1] for part in self._children(self._drafted, tree.top_k))
        levels = block_levels(ids, logprobs, tree.top_k)
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)))

    def select(self, kept: Sequence[int]) -> None:
        super().select(kept)
        self._newest = None if self._newest is None else self._newest[list(kept)]
        self._drafted = None if self._drafted is None else self._drafted[list(kept)]


def with_mask_rows(draft: BlockDraft, rows: Tensor, newest: Tensor, count: int) -> Tensor:
    """Input rows [B, n, X] and, behind them, the first ``count`` mask rows of the newest of them [B, X]."""
    return torch.cat([rows, draft.block_rows(newest)[:, :count]], dim=1)


def block_layout(counts: Tensor, rows: int, masks: int) -> tuple[Tensor, Tensor]:
    """What the rows of one forward see of each other, and their positions.

    Args:
        counts: [B] rows that each sequence has. Others of the ``rows`` are padding, which no row sees.

    Returns:
        visible [B, n + m, n + m] bool, and positions [B, n + m] relative to the first row. The mask rows follow the
        newest row.

    >>> visible, positions = block_layout(torch.tensor([1]), 2, 2)
    >>> visible.int().tolist(), positions.tolist()
    ([[[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], [[0, 1, 1, 2]])
    """
    place, own = torch.arange(rows + masks, device=counts.device), counts.unsqueeze(1)  # [n + m], [B, 1]
    exists = (place < own) | (place >= rows)  # [B, n + m]
    visible = (place.unsqueeze(1) >= place) & exists.unsqueeze(1)  # [B, n + m, n + m]
    return visible, torch.where(place < rows, place, place - rows + own)


def block_levels(ids: Tensor, logprobs: Tensor, top_k: int) -> list[Candidates]:
    """The candidates of each level, [B, M'] each: children of the ``top_k`` best nodes of the level before.

    Args:
        ids, logprobs: [B, levels, k] the children of all nodes of a level.
    """
    tokens, scores = ids[:, 0], logprobs[:, 0]  # [B, k]
    levels = [Candidates(tokens, scores, torch.full_like(tokens, -1))]
    batch, total = tokens.shape
    parents, frontier = torch.arange(total, device=ids.device).expand(batch, -1), scores  # [B, f] candidate, its score
    for level in range(1, ids.shape[1]):
        count = frontier.shape[1]
        scores = (frontier.unsqueeze(2) + logprobs[:, level].unsqueeze(1)).flatten(1)  # [B, f * k]
        tokens = ids[:, level].unsqueeze(1).expand(-1, count, -1).flatten(1)
        levels.append(Candidates(tokens, scores, parents.repeat_interleave(ids.shape[2], dim=1)))
        if level + 1 < ids.shape[1]:
            frontier, best = scores.topk(min(top_k, scores.shape[1]))
            parents, total = best + total, total + scores.shape[1]
    return levels


def drafter_of(
    draft: DraftHead,
    head: Callable[[Tensor], Tensor],
    capacity: int,
    tree: TreeConfig,
    *more: Any,
    target_cache: Callable[[], KVCache],
) -> Drafter:
    """A drafter for the kind of the head; arguments as of `Drafter`. ``target_cache``: as of `AssistantDrafter`."""
    if isinstance(draft, AssistantDraft):
        return AssistantDrafter(draft, head, capacity, tree, *more, target_cache=target_cache)
    if isinstance(draft, BlockDraft):
        return BlockDrafter(draft, head, capacity, tree, *more)
    return Drafter(draft, head, capacity, tree, *more)

"""Grows the trees of block heads (`eagle.drafts.block`): one forward drafts all levels.

Mask rows are read together with the rows that were accepted, and leave the cache with the end of that forward. What a
mask row drafts does not depend on the tokens before it, so all nodes of a level have the same children. A node's score
is the sum of the log-probabilities of its path, as in other trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eagle.decode.assistant import AssistantDrafter
from eagle.decode.drafter import Drafter, at_ends, draft_levels
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
        output = self._read_with_masks(rows, counts, at_ends(rows, counts))
        newest, behind = at_ends(output, counts), output[:, rows.shape[1] :]
        self._drafted = torch.cat([newest.unsqueeze(1), behind], dim=1)
        return newest

    def _read_with_masks(self, rows: Tensor, counts: Sequence[int], newest: Tensor) -> Tensor:
        """One forward over accepted rows and mask rows, [B, n + m, H].

        Args:
            rows: [B, n, X], of which each sequence has ``counts``; n may be 0.
            newest: [B, X] the newest row of each sequence.
        """
        count, device = rows.shape[1], rows.device
        x = torch.cat([rows, self.draft.block_rows(newest)[:, : self._mask_count]], dim=1)  # [B, n + m, X]
        own = torch.tensor(counts, device=device).unsqueeze(1)  # [B, 1]
        place = torch.arange(x.shape[1], device=device)
        exists = (place < own) | (place >= count)  # [B, n + m]; the others are padding
        visible = (place.unsqueeze(1) >= place) & exists.unsqueeze(1)  # [B, n + m, n + m]
        starts = torch.tensor([self._lengths, self._shift], device=device).sum(dim=0)
        positions = starts.unsqueeze(1) + torch.where(place < count, place, place - count + own)
        mask = self._mask(visible, [1] * len(place)) if positions.numel() > 1 else None
        return self.draft(x, None, mask, self.cache, self._angles(positions))

    def expand(self, tree: TreeConfig, should_deepen: Callable[[Tensor], bool] | None = None) -> Candidates:
        if self._drafted is None:  # nothing was accepted since the prompts
            self._drafted = self._last.unsqueeze(1)
            if self._mask_count:
                assert self._newest is not None
                behind = self._read_with_masks(self._newest[:, None][:, :0], [0] * len(self._newest), self._newest)
                self._drafted = torch.cat([self._drafted, behind], dim=1)
                self.cache.truncate(self._lengths)
        drafted = self._drafted[:, : tree.depth + 1]  # [B, levels, H]
        ids, logprobs = self._children(drafted, tree.top_k)  # [B, levels, k]

        def step(
            tokens: Tensor, hidden: Tensor, tree_mask: Tensor, widths: Sequence[int]
        ) -> tuple[Tensor, Tensor, Tensor]:
            level, width = len(widths), tokens.shape[1]
            children, chances = (part[:, level, None].expand(-1, width, -1) for part in (ids, logprobs))
            return hidden, children, chances

        bounds = replace(tree, depth=drafted.shape[1] - 1)
        levels = draft_levels((ids[:, :1], logprobs[:, :1]), drafted[:, :1], bounds, step, should_deepen)
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)))

    def select(self, kept: Sequence[int]) -> None:
        super().select(kept)
        self._newest = None if self._newest is None else self._newest[list(kept)]
        self._drafted = None if self._drafted is None else self._drafted[list(kept)]


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

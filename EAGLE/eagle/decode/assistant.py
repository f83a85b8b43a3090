"""Grows draft trees with a Gemma 4 assistant (`eagle.drafts.assistant`), which reads the target's cache.

It has no cache of its own, so nothing is read when tokens are accepted: of these it needs the newest, and the hidden
state that chose it. Each level is one forward. All its rows have the same position and see the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eagle.decode.drafter import Drafter, draft_levels
from eagle.decode.tree import Candidates
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.assistant import AssistantDraft
from eagle.families.base import Prefill
from eagle.kv_cache import KVCache


class AssistantDrafter(Drafter):
    """`Drafter` for an assistant.

    Args:
        target_cache: gives the target's cache of the sequences that are being decoded.
    """

    draft: AssistantDraft

    def __init__(
        self,
        draft: AssistantDraft,
        head: Callable[[Tensor], Tensor],
        capacity: int,
        tree: TreeConfig,
        batch: int = 1,
        *more: Any,
        target_cache: Callable[[], KVCache],
    ) -> None:
        self._target_cache = target_cache
        super().__init__(draft, head, capacity, tree, batch, *more)
        size = draft.assistant.backbone_hidden_size
        self._features = torch.zeros(batch, size, dtype=draft.dtype, device=draft.device)
        self._newest = torch.zeros(batch, dtype=torch.long, device=draft.device)

    def _new_cache(self, batch: int, rows: int) -> KVCache:
        return self._target_cache()

    def _extend_rope(self, count: int) -> None:
        """Nothing to do: the stock model computes its angles."""

    def grow(self, capacity: int) -> None:
        """Nothing to do: the target's cache grows."""

    def start(self, row: int, prefill: Prefill, input_ids: Tensor, first_token: Tensor) -> None:
        self._features[row], self._newest[row] = prefill.features[0, -1], first_token[0]

    def extend(self, hidden: Sequence[Tensor], tokens: Sequence[Tensor]) -> None:
        self._features = torch.stack([rows[-1] for rows in hidden]).to(self._features)
        self._newest = torch.stack([ids[-1] for ids in tokens]).to(self._newest)

    def expand(self, tree: TreeConfig, should_deepen: Callable[[Tensor], bool] | None = None) -> Candidates:
        cache = self._target_cache()
        positions = self.draft.row_positions(torch.tensor(cache.lengths, device=self.draft.device)).unsqueeze(1)

        def read(tokens: Tensor, hidden: Tensor) -> Tensor:
            x = self.draft.text_rows(hidden, tokens)  # [B, k, X]
            return self.draft(x, positions.expand(-1, x.shape[1]), None, cache)

        def step(
            tokens: Tensor, hidden: Tensor, tree_mask: Tensor, widths: Sequence[int]
        ) -> tuple[Tensor, Tensor, Tensor]:
            output = read(tokens, hidden)
            return output, *self._children(output, tree.top_k)

        hidden = read(self._newest.unsqueeze(1), self.draft.condense(self._features).unsqueeze(1))
        levels = draft_levels(self._children(hidden, tree.top_k), hidden, tree, step, should_deepen)
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)))

    def select(self, rows: Sequence[int]) -> None:
        self._features, self._newest = self._features[list(rows)], self._newest[list(rows)]

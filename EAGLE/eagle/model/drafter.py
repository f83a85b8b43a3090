"""Grows the draft tree: one forward of the draft head per level, on its own KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eagle.model.cache import KVCache
from eagle.model.config import TreeConfig
from eagle.model.draft import DraftModel
from eagle.model.masks import MaskBuffer
from eagle.model.targets.base import Prefill
from eagle.model.tree import Candidates, choose_frontier, top_children


class Drafter:
    """The draft head at work on one request.

    Its cache holds one row for each input row that is certain (rows of the target's true hidden states); the rows of
    drafted nodes come after them and are forgotten when the next cycle starts.

    Args:
        head: the target's ``lm_head``, [..., H] → [..., V].
        capacity: certain rows to hold: prompt and new tokens.
        tree: the largest tree that will be grown.
    """

    def __init__(self, draft: DraftModel, head: Callable[[Tensor], Tensor], capacity: int, tree: TreeConfig) -> None:
        self.draft, self.head = draft, head
        config, device = draft.config, draft.device
        drafted = max(tree.depth, 1) * tree.top_k
        extended = tree.depth + 2
        rows = capacity + drafted + extended
        self.cache = KVCache([device], 1, config.num_key_value_heads, config.head_dim, rows, draft.dtype)
        self._masks = MaskBuffer(max(tree.top_k, extended), rows, draft.dtype, device)
        self._causal = torch.ones(extended, extended, dtype=torch.bool, device=device).tril()
        positions = torch.arange(rows, device=device).unsqueeze(0)
        self._cos, self._sin = draft.rotary(positions, draft.dtype)  # [1, 1, rows, D]
        self._certain = 0
        self._last: Tensor  # [1, H] prediction after the last certain row

    def start(self, prefill: Prefill, input_ids: Tensor, first_token: Tensor) -> None:
        """Reads the prompt: row t pairs ``h_t`` with ``x_{t+1}``, the last row with the first new token.

        Args:
            input_ids: [1, S]; ``first_token``: [1].
        """
        device = self.draft.device
        next_ids = torch.cat([input_ids[0, 1:], first_token]).unsqueeze(0).to(device)  # [1, S]
        next_is_image = torch.cat([prefill.image_mask[:, 1:], prefill.image_mask.new_zeros(1, 1)], dim=1).to(device)
        features = prefill.embeds.roll(-1, dims=1).to(device)  # [1, S, H]; the wrapped last row is never an image
        embeds = torch.where(next_is_image.unsqueeze(-1), features, self.draft.embed_tokens(next_ids))
        rows = self.draft.fuse(prefill.hidden.to(device), embeds, next_is_image)
        self._feed(rows, mask=None)

    def extend(self, hidden: Tensor, tokens: Tensor) -> None:
        """Feeds the rows that the last cycle made certain, in place of the drafted ones.

        Args:
            hidden: [1, n, H] the target's hidden states on the accepted path, root included.
            tokens: [n] the token that follows each of them; the last is the bonus token.
        """
        self.cache.truncate(self._certain)
        device, count = self.draft.device, tokens.shape[0]
        rows = self.draft.fuse(hidden.to(device), self.draft.embed_tokens(tokens.to(device)).unsqueeze(0))
        mask = self._masks.window(self._certain, self._causal[:count, :count]) if count > 1 else None
        self._feed(rows, mask)

    def _feed(self, rows: Tensor, mask: Tensor | None) -> None:
        count = rows.shape[1]
        self._last = self.draft(rows, None, mask, self.cache, self._rope(self._certain, count))[:, -1]  # [1, H]
        self._certain += count

    def expand(self, tree: TreeConfig) -> Candidates:
        """Drafts ``tree.depth + 1`` levels; all drafted nodes are candidates of the tree."""
        tokens, scores = top_children(self.head(self._last), tree.top_k)  # [1, k]
        tokens, scores = tokens[0].to(self.draft.device), scores[0].to(self.draft.device)  # [k]
        width = tokens.shape[0]
        parents = torch.full_like(tokens, -1)
        levels = [Candidates(tokens, scores, parents)]
        hidden = self._last.expand(width, -1)  # [k, H] hidden state each frontier node was drawn from
        indices = torch.arange(width, device=tokens.device)  # candidate index of each frontier node
        sight = torch.eye(width, dtype=torch.bool, device=tokens.device)  # [k, rows drafted so far]
        total = width
        for step in range(tree.depth):
            output = self._step(tokens, hidden, sight, self._certain + step)  # [k, H]
            child_tokens, child_logprobs = top_children(self.head(output).to(tokens.device), tree.top_k)  # [k, k]
            child_scores = child_logprobs + scores.unsqueeze(-1)
            parents = indices.repeat_interleave(child_tokens.shape[1])
            levels.append(Candidates(child_tokens.flatten(), child_scores.flatten(), parents))
            if step + 1 == tree.depth:
                break
            flat, rows = choose_frontier(child_scores, tree.top_k)  # [k]
            tokens, scores, hidden = child_tokens.flatten()[flat], child_scores.flatten()[flat], output[rows]
            indices, total = flat + total, total + child_tokens.numel()
            own = torch.eye(flat.shape[0], dtype=torch.bool, device=tokens.device)
            sight = torch.cat([sight[rows], own], dim=1)
        return Candidates(*(torch.cat(parts) for parts in zip(*levels, strict=True)))

    def _step(self, tokens: Tensor, hidden: Tensor, sight: Tensor, position: int) -> Tensor:
        """One draft forward over the frontier: tokens [k], hidden [k, H] → predicted hidden states [k, H]."""
        rows = self.draft.fuse(hidden, self.draft.embed_tokens(tokens)).unsqueeze(0)  # [1, k, H]
        mask = self._masks.window(self._certain, sight)
        return self.draft(rows, None, mask, self.cache, self._rope(position, 1))[0]

    def _rope(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Rotary angles of ``count`` positions, [1, 1, count, D]; a single one serves a whole level."""
        return self._cos[:, :, start : start + count], self._sin[:, :, start : start + count]

"""Grows draft trees: one forward of the draft head per level, on its own KV cache, for all sequences of a batch.

`eagle.decode.block` has the drafter of heads that draft all levels in one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagle.decode.masks import MaskBuffer
from eagle.decode.tree import Candidates, choose_frontier
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.compression import Compression
from eagle.drafts.head import DraftHead, Prompt
from eagle.families.base import Prefill, within_window
from eagle.kv_cache import KVCache

Step = Callable[[Tensor, Tensor, Tensor, Sequence[int]], tuple[Tensor, Tensor, Tensor]]
"""Drafts a level: tokens [B, k], the hidden states [B, k, H] from which they were drawn, which drafted rows each sees
[B, k, m] and how many rows each level so far has → predicted hidden states [B, k, H], and ids and log-probabilities of
the children, [B, k, k] each."""


class Drafter:
    """The draft head for one request of ``batch`` sequences.

    Its cache holds one row for each accepted input row (these have the target's true hidden states). The rows of
    drafted nodes come after them and are removed when the next cycle starts.

    Args:
        head: the target's ``lm_head``, [..., H] → [..., V].
        capacity: number of accepted rows, of prompt and new tokens, that there is room for (`grow`).
        tree: the largest tree that will be drafted.
        compression: of the prompt's image rows. None follows the draft's config.
    """

    def __init__(
        self,
        draft: DraftHead,
        head: Callable[[Tensor], Tensor],
        capacity: int,
        tree: TreeConfig,
        batch: int = 1,
        compression: Compression | None = None,
    ) -> None:
        self.draft, self.head = draft, head
        self.compression = compression or draft.compression or Compression()
        config, device = draft.config, draft.device
        extended = tree.depth + 2
        self._beyond = max(tree.depth, 1) * tree.top_k + extended  # rows that are not accepted
        rows = capacity + self._beyond
        self.cache = self._new_cache(batch, rows)
        self._mask_rows = max(tree.top_k, extended + draft.block_size - 1)
        self._masks = MaskBuffer(self._mask_rows, rows, draft.dtype, device)
        self._causal = torch.ones(1, extended, extended, dtype=torch.bool, device=device).tril()
        self._rows, self._rope_length = rows, 0
        self._extend_rope(rows)
        self._lengths = [0] * batch
        self._shift = [0] * batch  # position id minus row index of new tokens; 0 for plain positions
        self._context: Tensor | None = None  # [B, C] what the rows of each sequence get from its prompt
        self._last = torch.zeros(
            batch, config.hidden_size, dtype=draft.dtype, device=device
        )  # predicted after the accepted rows

    def grow(self, capacity: int) -> None:
        """Makes room for ``capacity`` accepted rows."""
        self._rows = capacity + self._beyond
        self.cache.grow(self._rows)
        self._masks = MaskBuffer(self._mask_rows, self._rows, self.draft.dtype, self.draft.device)
        self._extend_rope(self._rows + max(0, *self._shift))

    def start(self, index: int, prefill: Prefill, input_ids: Tensor, first_token: Tensor) -> None:
        """Reads the prompt of sequence ``index``: row t pairs ``h_t`` with ``x_{t+1}``, the last row with the first new
        token.

        Args:
            prefill: of this sequence alone, B = 1.
            input_ids: [1, S]; ``first_token``: [1].
        """
        device = self.draft.device
        next_ids = torch.cat([input_ids[0, 1:], first_token]).unsqueeze(0).to(device)  # [1, S]
        next_is_image = torch.cat([prefill.image_mask[:, 1:], prefill.image_mask.new_zeros(1, 1)], dim=1).to(device)
        next_embeds = prefill.embeds.roll(-1, dims=1).to(device)  # [1, S, H]; the wrapped last row is never an image
        features, positions = prefill.features.to(device), prefill.positions.to(device)  # [1, S, F], [1 or 3, (1,) S]
        prompt = Prompt(features, next_ids, next_is_image, next_embeds, positions, prefill.next_position)
        x, own_positions, next_position, context = self.draft.read_prompt(prompt, self.compression)
        count = x.shape[1]
        rope = self._slice(0, count) if own_positions is None else self.draft.rotary(own_positions, x.dtype)
        if next_position is not None:
            self._shift[index] = next_position - count
            self._extend_rope(self._rows + self._shift[index])
        if context is not None:
            if self._context is None:
                self._context = context.new_zeros(len(self._lengths), context.shape[-1])
            self._context[index] = context[0]
        mask = None if self.draft.window is None else window_mask(count, self.draft.window, device)
        self._last[index] = self._read_prompt(index, x, mask, rope)
        self._lengths[index] = count
        self.cache.truncate(self._lengths)

    def extend(self, hidden: Sequence[Tensor], tokens: Sequence[Tensor]) -> None:
        """Reads the rows that were accepted since the last draft; they replace the drafted ones.

        Args:
            hidden: for each sequence [n, F], the target's features on the accepted path, root included.
            tokens: for each sequence [n], the token that follows each of them; the last is the bonus token.
        """
        self.cache.truncate(self._lengths)
        longest = self._causal.shape[-1]
        device, counts = self.draft.device, [rows.shape[0] for rows in tokens]
        parts = -(-max(counts) // longest)
        if parts > 1:  # rows of several cycles that did not draft; each sequence has at least one row of each of them
            for part in range(parts):
                share = [slice(count * part // parts, count * (part + 1) // parts) for count in counts]
                self.extend(
                    [rows[own] for rows, own in zip(hidden, share, strict=True)],
                    [rows[own] for rows, own in zip(tokens, share, strict=True)],
                )
            return
        following = pad_sequence(list(tokens), batch_first=True).to(device)  # [B, n]
        true_rows = pad_sequence(list(hidden), batch_first=True).to(device)  # [B, n, F]
        self._last = self._read_accepted(following, true_rows, counts)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        self.cache.truncate(self._lengths)

    def _new_cache(self, batch: int, rows: int) -> KVCache:
        config, draft = self.draft.config, self.draft
        shapes = [(config.num_key_value_heads, config.head_dim)] * len(draft.layers)
        return KVCache.allocate([draft.device] * len(shapes), batch, shapes, rows, draft.dtype)

    def _read_prompt(self, index: int, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The draft's output [H] of the last of the prompt's rows [1, S, X] of sequence ``index``."""
        return self.draft(x, None, mask, self.cache.sequence(index), rope, last_only=True)[0, 0]

    def _read_accepted(self, tokens: Tensor, hidden: Tensor, counts: Sequence[int]) -> Tensor:
        """The draft's output [B, H] of each sequence's last row; of the rows [B, n] it has ``counts``."""
        return at_ends(self._read(tokens, hidden), counts)

    def _read(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """One draft forward over accepted rows: tokens [B, n], hidden [B, n, F] → outputs [B, n, H]."""
        batch, count = tokens.shape
        mask = None
        if batch * count > 1 or self.draft.window is not None:
            mask = self._mask(self._causal[:, :count, :count].expand(batch, -1, -1), [1] * count)
        x = self.draft.text_rows(self.draft.condense(hidden), tokens, self._context)
        return self.draft(x, None, mask, self.cache, self._rope(0, count))

    def expand(self, tree: TreeConfig, should_deepen: Callable[[Tensor], bool] | None = None) -> Candidates:
        """Drafts ``tree.depth + 1`` levels; all drafted nodes are candidates of the tree, [B, M] each.

        Args:
            should_deepen: called with the scores [B, m] of each level but the last; says whether to draft another.
        """
        hidden = self._last.unsqueeze(1)  # [B, 1, H]
        first = self._children(hidden, tree.top_k)
        levels = draft_levels(first, hidden, tree, partial(self._step, tree.top_k), should_deepen)
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)))

    def select(self, kept: Sequence[int]) -> None:
        """Keeps only the given sequences."""
        self.cache = self.cache.select(kept)
        self._lengths, self._shift = ([values[index] for index in kept] for values in (self._lengths, self._shift))
        self._last = self._last[list(kept)]
        self._context = None if self._context is None else self._context[list(kept)]

    def _children(self, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Drafted tokens after predicted hidden states [B, F, H], [B, F, k] each."""
        return self.draft.likely_next(hidden, top_k, self.head)

    def _step(
        self, top_k: int, tokens: Tensor, hidden: Tensor, tree_mask: Tensor, widths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One draft forward over the frontiers (`Step`)."""
        x = self.draft.text_rows(hidden, tokens, self._context)  # [B, k, X]
        mask = self._mask(tree_mask, widths)
        output = self.draft(x, None, mask, self.cache, self._rope(len(widths) - 1, 1))
        return output, *self._children(output, top_k)

    def _mask(self, block: Tensor, widths: Sequence[int]) -> Tensor:
        """The mask of ``block`` [B, n, m]. ``widths``: rows of each level in the block, in order; they add up to m."""
        mask = self._masks.window(self._lengths, block)
        if self.draft.window is None:
            return mask
        depths = depths_of(widths, mask.device).expand(block.shape[0], -1)
        return within_window(mask, self._lengths, depths, self.draft.window)

    def _rope(self, offset: int, count: int) -> tuple[Tensor, Tensor]:
        """Rotary angles of ``count`` positions, ``offset`` after the accepted rows, [1 or B, 1, count, D]; a single
        position serves a whole level."""
        starts = [length + shift + offset for length, shift in zip(self._lengths, self._shift, strict=True)]
        if len(starts) == 1:
            return self._slice(starts[0], count)
        device = self._cos.device
        return self._angles(torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(count, device=device))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary angles of ``positions`` [B, n], [B, 1, n, D]."""
        return self._cos[0, 0, positions].unsqueeze(1), self._sin[0, 0, positions].unsqueeze(1)

    def _extend_rope(self, count: int) -> None:
        """Angles of the positions below ``count``. M-RoPE positions can be larger than the row index (long videos)."""
        if count > self._rope_length:
            positions = torch.arange(count, device=self.draft.device).unsqueeze(0)
            self._cos, self._sin = self.draft.rotary(positions, self.draft.dtype)  # [1, 1, count, D]
            self._rope_length = count

    def _slice(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        return self._cos[:, :, start : start + count], self._sin[:, :, start : start + count]


def draft_levels(
    first: tuple[Tensor, Tensor],
    hidden: Tensor,
    tree: TreeConfig,
    step: Step,
    should_deepen: Callable[[Tensor], bool] | None = None,
) -> list[Candidates]:
    """The candidates of each of ``tree.depth + 1`` levels. Sizes depend on ``tree`` alone, so it can be compiled.

    Args:
        first: ids and log-probabilities of the children of the root, [B, 1, k] each.
        hidden: [B, 1, H] predicted hidden states from which these were drawn.
        step: drafts one level.
        should_deepen: as for `Drafter.expand`.
    """
    tokens, scores = (part[:, 0] for part in first)  # [B, k]
    batch, width = tokens.shape
    identity = torch.eye(max(width, tree.top_k), dtype=torch.bool, device=tokens.device)
    levels = [Candidates(tokens, scores, torch.full_like(tokens, -1))]
    hidden = hidden.expand(-1, width, -1)  # [B, k, H] hidden state each frontier node was drawn from
    indices = torch.arange(width, device=tokens.device).expand(batch, -1)  # [B, k] candidate index of each
    tree_mask = identity[:width, :width].expand(batch, -1, -1)  # [B, k, drafted so far]
    total, widths = width, [width]
    for level in range(tree.depth):
        if should_deepen is not None and not should_deepen(levels[-1].scores):
            break
        output, child_tokens, child_logprobs = step(tokens, hidden, tree_mask, widths)
        child_scores = child_logprobs + scores.unsqueeze(-1)  # [B, k, k]
        parents = indices.repeat_interleave(child_tokens.shape[-1], dim=1)
        levels.append(Candidates(child_tokens.flatten(1), child_scores.flatten(1), parents))
        if level + 1 == tree.depth:
            break
        flat, rows = choose_frontier(child_scores, tree.top_k)  # [B, k]
        tokens, scores = child_tokens.flatten(1).gather(1, flat), child_scores.flatten(1).gather(1, flat)
        hidden = _take(output, rows)
        widths.append(flat.shape[1])
        indices, total = flat + total, total + child_tokens[0].numel()
        own = identity[: flat.shape[1], : flat.shape[1]].expand(batch, -1, -1)
        tree_mask = torch.cat([_take(tree_mask, rows), own], dim=2)
    return levels


def at_ends(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Of ``values`` [B, n, X] the last of each sequence's ``counts`` rows, [B, X]."""
    if len(counts) == 1:
        return values[:, counts[0] - 1]
    index = torch.tensor(counts, device=values.device) - 1
    return values[torch.arange(len(counts), device=values.device), index]


def depths_of(widths: Sequence[int], device: torch.device) -> Tensor:
    """The level of each row, if the levels have so many rows."""
    return torch.tensor([depth for depth, width in enumerate(widths) for _ in range(width)], device=device)


def window_mask(rows: int, window: int, device: torch.device) -> Tensor | None:
    """Causal, and not further back than ``window`` rows, the row itself included: [1, 1, R, R] bool. None if that is
    plain causal."""
    if rows <= window:
        return None
    places = torch.arange(rows, device=device)
    back = places.unsqueeze(1) - places  # [R, R]
    return ((back >= 0) & (back < window))[None, None]


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """``values`` [B, F, X] at ``rows`` [B, f] → [B, f, X]."""
    return values.gather(1, rows.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

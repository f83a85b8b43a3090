"""The draft's loss: SmoothL1 on hidden states plus soft cross-entropy on the target's ``lm_head`` of them.

`DraftObjective` trains MSD drafts with it, `eagle.train.vispec` ViSpec heads. EAGLE-3 heads have an ``lm_head`` of
their own, which is trained too.

Notation: N rows that count, H hidden size, V vocabulary, K the draft's. Full logits [N, V] never exist: the rows of
all rollout steps go through ``lm_head`` in chunks, and a chunk's gradients are computed with its loss. Only they are
kept for the backward pass: [N, H] of the rows, and [K, H] if the head is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle.drafts.config import DraftConfig
from eagle.drafts.modules import capped
from eagle.drafts.msd import DraftModel
from eagle.families.base_weights import BaseTensors
from eagle.train.collate import Batch
from eagle.train.objective import TOP, Head, Losses, Objective, best_tokens, cast_once
from eagle.train.settings import TrainConfig
from llava.errors import UserError


class TargetHead(NamedTuple):
    """What gives the target's distribution over tokens: its ``lm_head`` [V, H], the ``cap`` of its logits, and the
    ``ids`` [K] of the draft's trimmed vocabulary, over which it is normalised again; None is all of it."""

    head: Tensor
    cap: float | None = None
    ids: Tensor | None = None


def _chunk_terms(
    predicted: Tensor, head: Tensor, cap: float | None, target: Tensor, base: TargetHead
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk: cross-entropies [n], their gradients with respect to the draft's logits [n, K], and hits [n, 3]."""
    logits = F.linear(predicted, head).float()  # [n, K]
    wanted = F.linear(target, base.head).float()  # [n, V]
    if cap is not None:
        logits = capped(logits, cap)
    if base.cap is not None:
        wanted = capped(wanted, base.cap)
    choice = wanted.argmax(dim=-1, keepdim=True)
    best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices  # [n, 3]
    if base.ids is not None:
        best, wanted = base.ids[best], wanted[:, base.ids]
    hits = (best == choice).cumsum(dim=-1)
    log_p = logits.log_softmax(dim=-1)
    q = wanted.softmax(dim=-1)
    losses = -(q * log_p).sum(dim=-1)
    slope = log_p.exp_() - q
    if cap is not None:
        slope *= 1 - (logits / cap) ** 2  # through the tanh
    return losses, slope, F.pad(hits, (0, TOP - hits.shape[-1]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of float16, which sums over rows and scaled losses exceed. Others are kept."""
    return torch.float32 if dtype == torch.float16 else dtype


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        predicted: Tensor,
        head: Tensor,
        cap: float | None,
        target: Tensor,
        base: TargetHead,
        weights: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_rows, of_head, *_ = ctx.needs_input_grad
        count, device = predicted.shape[0], predicted.device
        losses = torch.empty(count, dtype=torch.float32, device=device)
        hits = torch.empty(count, TOP, dtype=torch.long, device=device)
        to_rows = torch.empty_like(predicted, dtype=_wide(predicted.dtype)) if of_rows else None
        to_head = torch.zeros_like(head, dtype=torch.float32) if of_head else None
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            own, wanted = predicted[rows].to(head.dtype), target[rows].to(base.head.dtype)
            losses[rows], slope, hits[rows] = _chunk_terms(own, head, cap, wanted, base)
            share = weights[rows, None]  # [n, 1]
            if to_rows is not None:
                to_rows[rows] = (slope.to(head.dtype) @ head) * share
            if to_head is not None:
                with torch.autocast(device.type, enabled=False):  # it would cast to 16 bit again
                    to_head += slope.mul_(share).to(_wide(head.dtype)).T @ own.to(_wide(head.dtype))
        ctx.save_for_backward(to_rows, None if to_head is None else to_head.to(_wide(head.dtype)))
        ctx.mark_non_differentiable(losses, hits)
        return (weights * losses).sum(), losses, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = [None if part is None else part * grads[0].to(part.dtype) for part in ctx.saved_tensors]
        return (*parts, None, None, None, None, None)


def soft_cross_entropy(
    predicted: Tensor,
    head: Tensor,
    target: Tensor,
    base: TargetHead,
    weights: Tensor,
    chunk: int,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies of the draft's distribution against the target's.

    Args:
        predicted: [N, H] what the draft's ``head`` [K, H] reads.
        target: [N, H] the target's hidden states. ``target`` and ``base`` get no gradient.
        weights: [N] of the rows.
        chunk: rows at a time.
        cap: of the draft's logits.

    Returns:
        the weighted sum (scalar, float32); without gradient, each row's cross-entropy [N] and its hits [N, 3]: whether
        the target's arg-max is among the draft's first 1, 2, 3 tokens.
    """
    wide = cast_once(base.head)
    own = wide if head is base.head else cast_once(head)
    own = own if torch.is_grad_enabled() else own.detach()
    return _SoftCrossEntropy.apply(predicted, own, cap, target, base._replace(head=wide), weights, chunk)


def draft_loss(
    predicted: Sequence[Tensor],
    target: Sequence[Tensor],
    head: Tensor,
    base: TargetHead | None = None,
    *,
    hidden_weight: float = 1.0,
    token_weight: float = 0.1,
    decay: float = 1.0,
    chunk: int = 512,
    cap: float | None = None,
) -> Losses:
    """The loss of the rollout steps, of which each is the published one; see `Objective.loss`.

    Args:
        predicted, target: [N_k, H] of each step.
        head: [K, H] the draft's; ``cap`` of its logits.
        base: None for a draft that has the same head.
        decay: the weight of a step relative to the one before.
    """
    sizes = [len(part) for part in predicted]
    first, shares = sizes[0], [decay**step for step in range(len(sizes))]
    own, wanted = torch.cat(list(predicted)), torch.cat(list(target))  # [N, H]
    weights = torch.cat(
        [
            torch.full((size,), share * first / max(size, 1), device=own.device)
            for size, share in zip(sizes, shares, strict=True)
        ]
    )  # [N] relative to a row of step 1
    base = TargetHead(head, cap) if base is None else base
    total, token, hits = soft_cross_entropy(own, head, wanted, base, weights, chunk, cap)
    total = token_weight * total
    hidden = torch.zeros(len(own), device=own.device)  # [N]
    if hidden_weight:
        hidden = F.smooth_l1_loss(own.float(), wanted.float(), reduction="none").mean(dim=-1)
        total = total + hidden_weight * (weights * hidden).sum()
    divisor = max(first, 1)
    hidden, token = (each[:first].detach().sum() / divisor for each in (hidden, token))
    rows = torch.full((), first, device=own.device)
    return Losses(total / (divisor * sum(shares)), hidden, token, hits[:first].sum(dim=0), rows)


class StateObjective(Objective[Head]):
    """Trains a draft that predicts the target's hidden states. Its ``embed_tokens`` is the base's table and frozen."""

    def __init__(self, draft: Head, base: BaseTensors, config: TrainConfig) -> None:
        super().__init__(draft, base, config)
        assert draft.embed_tokens is not None
        with torch.no_grad():
            draft.embed_tokens.weight.copy_(base.embed)
        draft.embed_tokens.requires_grad_(False)

    @staticmethod
    def check(draft: DraftConfig, base: BaseTensors, config: TrainConfig) -> None:
        check_base(draft, base)

    def embeds(self, batch: Batch) -> Tensor:
        embeds = self.draft.embed(batch.input_ids)
        return embeds.masked_scatter(batch.image_mask.unsqueeze(-1), batch.image_features.to(embeds.dtype))

    def loss(self, predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Losses:
        return draft_loss(predicted, target, self.head, cap=self.cap, **loss_settings(self.config))

    def drafted(self, predicted: Tensor) -> Tensor:
        return best_tokens(predicted, self.head, self.config.head_chunk)


class DraftObjective(StateObjective[DraftModel]):
    """Trains an MSD draft."""


def loss_settings(config: TrainConfig) -> dict[str, Any]:
    """The arguments of `draft_loss` that are settings of a run."""
    return {
        "hidden_weight": config.hidden_weight,
        "token_weight": config.token_weight,
        "decay": config.rollout_decay,
        "chunk": config.head_chunk,
    }


def check_base(config: DraftConfig, base: BaseTensors) -> None:
    """Raises `UserError` unless the draft has the base's sizes."""
    vocab, hidden = base.embed.shape
    if (config.vocab_size, config.hidden_size) != (vocab, hidden):
        raise UserError(
            f"the draft config has vocabulary {config.vocab_size} and hidden size {config.hidden_size}, "
            f"the base has {vocab} and {hidden}",
            fix="choose the config made for this base model",
        )

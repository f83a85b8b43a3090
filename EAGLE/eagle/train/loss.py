"""The draft's loss: SmoothL1 on hidden states plus soft cross-entropy on what the target's ``lm_head`` makes of them.

Notation: N rows that count, H hidden size, V vocabulary. Full logits [N, V] never exist: rows go through ``lm_head`` in
chunks, and a chunk's gradient is computed beside its loss, so nothing of size V is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TOP = 3  # accuracies reported: top-1 .. top-3


class Losses(NamedTuple):
    """``total`` the weighted loss with gradient; the others are detached. ``hits`` [3]: rows whose target arg-max is
    among the draft's first 1, 2, 3 tokens; ``rows``: rows that count. All scalars but ``hits`` are masked means."""

    total: Tensor
    hidden: Tensor
    token: Tensor
    hits: Tensor
    rows: Tensor


def _chunk_terms(predicted: Tensor, target: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk: sum of cross-entropies, its gradient [n, H] and the hits [3]."""
    logits = F.linear(predicted, head).float()  # [n, V]
    wanted = F.linear(target, head).float()
    best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices  # [n, 3]
    hits = (best == wanted.argmax(dim=-1, keepdim=True)).cumsum(dim=-1).sum(dim=0)
    hits = F.pad(hits, (0, TOP - hits.shape[0]), value=0)
    log_p = logits.log_softmax(dim=-1)
    q = wanted.softmax(dim=-1)
    loss = -(q * log_p).sum()
    gradient = (log_p.exp_() - q).to(head.dtype) @ head  # d loss / d predicted
    return loss, gradient, hits


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor, head: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=predicted.device)
        hits = torch.zeros(TOP, dtype=torch.long, device=predicted.device)
        gradient = torch.empty_like(predicted)
        for start in range(0, predicted.shape[0], chunk):
            rows = slice(start, start + chunk)
            own, wanted = predicted[rows].to(head.dtype), target[rows].to(head.dtype)
            part, gradient[rows], part_hits = _chunk_terms(own, wanted, head)
            loss += part
            hits += part_hits
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def soft_cross_entropy(predicted: Tensor, target: Tensor, head: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Sum over rows of ``-softmax(target @ head.T) . log_softmax(predicted @ head.T)``, and the hits.

    Args:
        predicted, target: [N, H]; ``target`` and ``head`` get no gradient.
        head: [V, H].
        chunk: rows at a time.

    Returns:
        the sum (scalar, float32) and hits [3], see `Losses`.
    """
    return _SoftCrossEntropy.apply(predicted, target, head, chunk)


def draft_loss(
    predicted: Tensor,
    target: Tensor,
    loss_mask: Tensor,
    head: Tensor,
    *,
    hidden_weight: float = 1.0,
    token_weight: float = 0.1,
    chunk: int = 512,
) -> Losses:
    """The published loss as means over the rows that count; 0 where there is none.

    Args:
        predicted, target: [B, R, H]; ``loss_mask`` [B, R] bool; ``head`` [V, H].
    """
    predicted, target = predicted[loss_mask], target[loss_mask].to(predicted.dtype)  # [N, H]
    rows = loss_mask.sum()
    divisor = rows.clamp(min=1)
    hidden = F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(dim=-1).sum() / divisor
    token, hits = soft_cross_entropy(predicted, target, head, chunk)
    token = token / divisor
    return Losses(hidden_weight * hidden + token_weight * token, hidden.detach(), token.detach(), hits, rows)


@torch.no_grad()
def best_tokens(hidden: Tensor, head: Tensor, chunk: int = 512) -> Tensor:
    """Arg-max of ``lm_head``. ``hidden`` [N, H] → [N] ids."""
    parts = [F.linear(part.to(head.dtype), head).argmax(dim=-1) for part in hidden.split(chunk)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=hidden.device)

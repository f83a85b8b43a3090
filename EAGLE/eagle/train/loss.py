"""The draft's loss: SmoothL1 on hidden states plus soft cross-entropy on the target's ``lm_head`` of them.

`DraftObjective` trains MSD drafts with it, `eagle.train.vispec` ViSpec heads.

Notation: N rows of the loss mask, H hidden size, V vocabulary. Full logits [N, V] never exist: rows go through
``lm_head`` in chunks, and a chunk's gradient is computed with its loss, so nothing of size V is kept for the backward
pass.
"""

from __future__ import annotations

from typing import Any

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


def _chunk_terms(predicted: Tensor, target: Tensor, head: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk: sum of cross-entropies, its gradient [n, H] and the hits [3]."""
    logits = F.linear(predicted, head).float()  # [n, V]
    wanted = F.linear(target, head).float()
    if cap is not None:
        logits, wanted = capped(logits, cap), capped(wanted, cap)
    best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices  # [n, 3]
    hits = (best == wanted.argmax(dim=-1, keepdim=True)).cumsum(dim=-1).sum(dim=0)
    hits = F.pad(hits, (0, TOP - hits.shape[0]), value=0)
    log_p = logits.log_softmax(dim=-1)
    q = wanted.softmax(dim=-1)
    loss = -(q * log_p).sum()
    slope = log_p.exp_() - q  # d loss / d logits
    if cap is not None:
        slope *= 1 - (logits / cap) ** 2  # through the tanh
    gradient = slope.to(head.dtype) @ head  # d loss / d predicted
    return loss, gradient, hits


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, predicted: Tensor, target: Tensor, head: Tensor, chunk: int, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=predicted.device)
        hits = torch.zeros(TOP, dtype=torch.long, device=predicted.device)
        gradient = torch.empty_like(predicted)
        for start in range(0, predicted.shape[0], chunk):
            rows = slice(start, start + chunk)
            own, wanted = predicted[rows].to(head.dtype), target[rows].to(head.dtype)
            part, gradient[rows], part_hits = _chunk_terms(own, wanted, head, cap)
            loss += part
            hits += part_hits
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def soft_cross_entropy(
    predicted: Tensor, target: Tensor, head: Tensor, chunk: int, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over rows of ``-softmax(target @ head.T) . log_softmax(predicted @ head.T)``, and the hits.

    Args:
        predicted, target: [N, H]; ``target`` and ``head`` get no gradient.
        head: [V, H].
        chunk: rows at a time.
        cap: of the logits (`eagle.families.base_weights.BaseTensors`).

    Returns:
        the sum (scalar, float32) and hits [3], see `Losses`.
    """
    return _SoftCrossEntropy.apply(predicted, target, cast_once(head), chunk, cap)


def draft_loss(
    predicted: Tensor,
    target: Tensor,
    loss_mask: Tensor,
    head: Tensor,
    *,
    hidden_weight: float = 1.0,
    token_weight: float = 0.1,
    chunk: int = 512,
    cap: float | None = None,
) -> Losses:
    """The published loss as means over the rows of the loss mask; 0 if there are none.

    Args:
        predicted, target: [B, R, H]; ``loss_mask`` [B, R] bool; ``head`` [V, H].
    """
    predicted, target = predicted[loss_mask], target[loss_mask].to(predicted.dtype)  # [N, H]
    rows = loss_mask.sum()
    divisor = rows.clamp(min=1)
    hidden = F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(dim=-1).sum() / divisor
    token, hits = soft_cross_entropy(predicted, target, head, chunk, cap)
    token = token / divisor
    return Losses(hidden_weight * hidden + token_weight * token, hidden.detach(), token.detach(), hits, rows)


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

    def loss(self, predicted: Tensor, target: Tensor, loss_mask: Tensor) -> Losses:
        """`draft_loss` with this run's settings."""
        config = self.config
        return draft_loss(
            predicted,
            target,
            loss_mask,
            self.head,
            hidden_weight=config.hidden_weight,
            token_weight=config.token_weight,
            chunk=config.head_chunk,
            cap=self.cap,
        )

    def drafted(self, predicted: Tensor) -> Tensor:
        return best_tokens(predicted, self.head, self.config.head_chunk)


class DraftObjective(StateObjective[DraftModel]):
    """Trains an MSD draft."""


def check_base(config: DraftConfig, base: BaseTensors) -> None:
    """Raises `UserError` unless the draft has the base's sizes."""
    vocab, hidden = base.embed.shape
    if (config.vocab_size, config.hidden_size) != (vocab, hidden):
        raise UserError(
            f"the draft config has vocabulary {config.vocab_size} and hidden size {config.hidden_size}, "
            f"the base has {vocab} and {hidden}",
            fix="choose the config made for this base model",
        )

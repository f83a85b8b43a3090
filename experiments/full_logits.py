"""The published way to compute the draft's loss: logits of every position at once, the mask afterwards.

For comparison with `eagle.train.loss`, which gives the same loss and gradient without tensors of V columns and R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle.train.loss import TOP, Losses
from eagle.train.objective import DraftObjective


def full_logits_loss(
    predicted: Tensor,
    target: Tensor,
    loss_mask: Tensor,
    head: Tensor,
    *,
    hidden_weight: float = 1.0,
    token_weight: float = 0.1,
) -> Losses:
    """As `eagle.train.loss.draft_loss`. ``predicted``, ``target`` [B, R, H]; ``loss_mask`` [B, R]; ``head`` [V, H]."""
    mask, rows = loss_mask.float(), loss_mask.sum()
    divisor = rows.clamp(min=1)
    hidden = F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(dim=-1)  # [B, R]
    logits = F.linear(predicted.to(head.dtype), head).float()  # [B, R, V]
    with torch.no_grad():
        wanted = F.linear(target.to(head.dtype), head).float().softmax(dim=-1)  # [B, R, V]
        best = logits.topk(TOP, dim=-1).indices  # [B, R, 3]
        hits = (best == wanted.argmax(dim=-1, keepdim=True)).cumsum(dim=-1)
    token = -(wanted * logits.log_softmax(dim=-1)).sum(dim=-1)  # [B, R]
    hidden, token = (hidden * mask).sum() / divisor, (token * mask).sum() / divisor
    total = hidden_weight * hidden + token_weight * token
    return Losses(total, hidden.detach(), token.detach(), hits[loss_mask].sum(dim=0), rows)


class FullLogitsObjective(DraftObjective):
    """The objective of training with this loss."""

    def loss(self, predicted: Tensor, target: Tensor, loss_mask: Tensor) -> Losses:
        weights = {"hidden_weight": self.config.hidden_weight, "token_weight": self.config.token_weight}
        return full_logits_loss(predicted, target, loss_mask, self.head, **weights)

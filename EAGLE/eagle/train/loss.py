"""The draft's loss: SmoothL1 on hidden states plus soft cross-entropy on the target's ``lm_head`` of them.

`DraftObjective` is what an engine trains: the draft, the base's frozen tensors and the loss, as one module.

Notation: N rows of the loss mask, H hidden size, V vocabulary. Full logits [N, V] never exist: rows go through
``lm_head`` in chunks, and a chunk's gradient is computed with its loss, so nothing of size V is kept for the backward
pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle.drafts.config import DraftConfig
from eagle.drafts.modules import capped
from eagle.drafts.msd import DraftModel
from eagle.families.base_weights import BaseTensors
from eagle.train.collate import Batch
from eagle.train.rollout import predict_steps, rollout_loss_mask, shift_left
from eagle.train.settings import TrainConfig
from llava.errors import UserError

TOP = 3  # accuracies reported: top-1 .. top-3


class Losses(NamedTuple):
    """``total`` the weighted loss with gradient; the others are detached. ``hits`` [3]: rows whose target arg-max is
    among the draft's first 1, 2, 3 tokens; ``rows``: those of the loss mask. The other scalars are masked means."""

    total: Tensor
    hidden: Tensor
    token: Tensor
    hits: Tensor
    rows: Tensor


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
    return _SoftCrossEntropy.apply(predicted, target, head, chunk, cap)


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


@torch.no_grad()
def best_tokens(hidden: Tensor, head: Tensor, chunk: int = 512) -> Tensor:
    """Arg-max of ``lm_head``. ``hidden`` [N, H] → [N] ids."""
    parts = [F.linear(part.to(head.dtype), head).argmax(dim=-1) for part in hidden.split(chunk)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=hidden.device)


class DraftObjective(nn.Module):
    """``forward(batch)`` gives the loss. ``draft.embed_tokens`` is the base's table and frozen; ``head`` [V, H] is the
    base's ``lm_head``, a buffer that no checkpoint holds."""

    head: Tensor

    def __init__(self, draft: DraftModel, base: BaseTensors, config: TrainConfig) -> None:
        super().__init__()
        check_base(draft.config, base)
        self.draft, self.config, self.cap = draft, config, base.cap
        draft.requires_grad_(True)
        with torch.no_grad():
            draft.embed_tokens.weight.copy_(base.embed)
        draft.embed_tokens.requires_grad_(False)
        self.register_buffer("head", base.head.to(draft.dtype, copy=True), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.dtype

    def embeds(self, batch: Batch) -> Tensor:
        """[B, S, H] embeddings, image features at image tokens."""
        embeds = self.draft.embed_tokens(batch.input_ids)
        return embeds.masked_scatter(batch.image_mask.unsqueeze(-1), batch.image_features.to(embeds.dtype))

    def loss(self, predicted: Tensor, target: Tensor, loss_mask: Tensor) -> Losses:
        """`draft_loss` with this run's settings. ``predicted``, ``target`` [B, R, H]; ``loss_mask`` [B, R]."""
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

    def forward(self, batch: Batch) -> Losses:
        """Loss of the batch: the mean of the rollout steps' losses, weighted by ``rollout_decay^(k-1)``; the values
        reported beside it are those of step 1."""
        config = self.config
        parts: list[tuple[float, Losses]] = []
        inputs = batch.inputs.to(self.dtype)
        steps = predict_steps(
            self.draft, inputs, self.embeds(batch), batch.image_mask, config.rollout_steps, batch.positions
        )
        for step, predicted in steps:
            target = shift_left(batch.hidden, step, predicted.shape[1])
            losses = self.loss(predicted, target, rollout_loss_mask(batch.loss_mask, step))
            parts.append((config.rollout_decay ** (step - 1), losses))
        total = torch.stack([weight * losses.total for weight, losses in parts]).sum()
        return parts[0][1]._replace(total=total / sum(weight for weight, _ in parts))


def check_base(config: DraftConfig, base: BaseTensors) -> None:
    """Raises `UserError` unless the draft has the base's sizes, and sections for M-RoPE positions."""
    vocab, hidden = base.embed.shape
    if (config.vocab_size, config.hidden_size) != (vocab, hidden):
        raise UserError(
            f"the draft config has vocabulary {config.vocab_size} and hidden size {config.hidden_size}, "
            f"the base has {vocab} and {hidden}",
            fix="choose the config made for this base model",
        )
    sections = config.mrope_section or ()
    if config.options.positions == "mrope" and 2 * sum(sections) != config.head_dim:
        raise UserError(
            f"positions 'mrope' with mrope_section {list(sections)} for heads of {config.head_dim}",
            fix="give rope_scaling an mrope_section that adds up to half a head, as the base model's",
        )


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without its frozen parameters."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_trained(state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Loads what `trained_state` gave. Frozen parameters may be there too, as in older checkpoints.

    Raises:
        RuntimeError: a tensor is missing, unexpected or of another shape.
    """
    if missing := trained_state(module).keys() - state.keys():
        raise RuntimeError(f"missing {', '.join(sorted(missing))}")
    module.load_state_dict({**module.state_dict(), **state})


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]

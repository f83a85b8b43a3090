"""What an engine trains: the draft, the base's frozen tensors and the loss, as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families.base_weights import BaseTensors
from eagle.train.dataset import Batch
from eagle.train.loss import Losses, draft_loss
from eagle.train.rollout import predict_steps, rollout_loss_mask, shift_left
from eagle.train.settings import TrainConfig
from llava.errors import UserError


class DraftObjective(nn.Module):
    """``forward(batch)`` gives the loss. ``draft.embed_tokens`` is the base's table and frozen; ``head`` [V, H] is the
    base's ``lm_head``, a buffer that no checkpoint holds."""

    head: Tensor

    def __init__(self, draft: DraftModel, base: BaseTensors, config: TrainConfig) -> None:
        super().__init__()
        check_base(draft.config, base)
        self.draft, self.config = draft, config
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


def parameter_groups(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]

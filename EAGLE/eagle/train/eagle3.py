"""Training of EAGLE-3 heads: what they read, and their loss, on tokens alone or with feature regression.

The head's own ``lm_head`` is trained against the target's distribution over the same tokens: of a trimmed vocabulary,
the part of it inside, normalised again (`eagle.train.loss`). With a ``hidden_weight``, what the ``lm_head`` reads is
also regressed on the target's hidden states after its final norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import Eagle3Config
from eagle.families.base_weights import BaseTensors
from eagle.ge_data.vocabulary import most_frequent
from eagle.train.collate import Batch
from eagle.train.loss import TargetHead, draft_loss, loss_settings
from eagle.train.objective import Losses, Objective, best_tokens
from eagle.train.settings import TrainConfig
from llava.errors import UserError


class Eagle3Objective(Objective[Eagle3Draft]):
    """Trains an EAGLE-3 head. ``table`` [V, H]: the base's token embedding, which the head reads and does not hold."""

    table: Tensor

    def __init__(self, draft: Eagle3Draft, base: BaseTensors, config: TrainConfig) -> None:
        super().__init__(draft, base, config)
        if draft.embed_tokens is not None:
            draft.embed_tokens.requires_grad_(False)
        self.register_buffer("table", base.embed.to(draft.dtype, copy=True), persistent=False)

    @property
    def own_head(self) -> Tensor:
        """[K, H] the head's own ``lm_head``."""
        assert self.draft.lm_head is not None  # `check_trainable`
        return self.draft.lm_head.weight

    @staticmethod
    def check(draft: Eagle3Config, base: BaseTensors, config: TrainConfig) -> None:
        check_trainable(draft, base, config)

    def begin(self, conversations: Iterable[Any]) -> None:
        """Chooses a trimmed vocabulary. The ``lm_head`` starts with the rows of the base's."""
        config, ids = self.draft.config, None
        if config.draft_vocab_size < config.vocab_size:
            ids = self.draft.draft_vocab = trimmed_vocabulary(conversations, config)
        with torch.no_grad():
            self.own_head.copy_(self.head if ids is None else self.head[ids.to(self.head.device)])

    def embeds(self, batch: Batch) -> Tensor:
        own = self.draft.embed_tokens
        embeds = F.embedding(batch.input_ids, self.table if own is None else own.weight)
        if self.draft.embeds_image_ids:
            return embeds
        return embeds.masked_scatter(batch.image_mask.unsqueeze(-1), batch.image_features.to(embeds.dtype))

    def loss(self, predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Losses:
        ids = self.draft.draft_vocab
        base = TargetHead(self.head, self.cap, None if ids is None else ids.to(self.head.device))
        rows = [self.draft.head_input(part) for part in predicted]
        return draft_loss(rows, target, self.own_head, base, **loss_settings(self.config))

    def drafted(self, predicted: Tensor) -> Tensor:
        tokens = best_tokens(self.draft.head_input(predicted), self.own_head, self.config.head_chunk)
        ids = self.draft.draft_vocab
        return tokens if ids is None else ids.to(tokens.device)[tokens]


def check_trainable(config: Eagle3Config, base: BaseTensors, settings: TrainConfig) -> None:
    """Raises `UserError` for a head that does not fit the base or cannot be trained, or for settings without effect."""
    vocabulary, hidden = base.embed.shape
    if (config.vocab_size, config.hidden_size, config.target_hidden_size) != (vocabulary, hidden, hidden):
        raise UserError(
            f"the draft config has vocabulary {config.vocab_size}, hidden size {config.hidden_size} and "
            f"target_hidden_size {config.target_hidden_size}, the base has {vocabulary} and {hidden}",
            fix="choose the config made for this base model",
        )
    if config.layout != "flat":
        raise UserError("a config in the layout of speculators", fix="train with one in the flat layout")
    if not config.own_head:
        raise UserError("EAGLE-3 heads without their own lm_head cannot be trained", fix="give a head that has one")
    if config.draft_vocab_size > vocabulary:
        raise UserError(f"draft_vocab_size {config.draft_vocab_size} of a vocabulary of {vocabulary}")
    if settings.token_weight == 0:
        fix = "leave it out: the head's own lm_head has no other loss"
        raise UserError(f"token_weight={settings.token_weight} for an EAGLE-3 head", fix=fix)


def trimmed_vocabulary(conversations: Iterable[Any], config: Eagle3Config) -> Tensor:
    """Ids [K], ascending, of the most frequent tokens in answers; where fewer than K occur, the first other ids too.

    Args:
        conversations: with ``input_ids`` and ``loss_mask`` (`eagle.families.template.Prepared`).
    """
    counts = torch.zeros(config.vocab_size, dtype=torch.int64)
    for each in conversations:
        counts += torch.bincount(each.input_ids[each.loss_mask.bool()], minlength=config.vocab_size)
    kept = torch.zeros(config.vocab_size, dtype=torch.bool)
    kept[most_frequent(counts, config.draft_vocab_size)[0]] = True
    others = (~kept).nonzero().flatten()
    kept[others[: config.draft_vocab_size - int(kept.sum())]] = True
    return kept.nonzero().flatten()

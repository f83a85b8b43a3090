"""Checks that a draft was trained for the base model it is loaded with."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from eagle.drafts.msd import DraftModel
from eagle.families import Target
from llava.errors import UserError

SAMPLE = 64  # rows of the embedding that are compared
TOLERANCE = 0.1  # of their relative difference: rounding to 16 bit gives less than 0.01
FIX = "use the draft that was trained for this base model"
log = logging.getLogger(__name__)


def check_compatible(target: Target, draft: DraftModel) -> None:
    """Refuses a draft of another base model. A base may have more tokens than the draft, as the ``-hf`` releases of
    LLaVA do. The draft's embedding is a copy of the base's, so the missing rows are copied from there.

    Raises:
        UserError: the family, hidden size or vocabulary differ.
    """
    model = target.model
    check_tensors(target.family, model.get_input_embeddings().weight, model.get_output_embeddings().weight, draft)


def check_tensors(family: str, table: Tensor, head: Tensor, draft: DraftModel) -> None:
    """As `check_compatible`, from the base's token embedding ``table`` [V, H] and ``lm_head`` [V, H] alone."""
    check_family(family, draft.config.model_type)
    (base, size), own = table.shape, draft.config.vocab_size
    if size != draft.config.hidden_size:
        raise misfit("hidden size", draft.config.hidden_size, size)
    alike = same_rows(table, draft.embed_tokens.weight)
    if own < base and alike:
        extend(draft, table[own:])
    elif own != base:
        raise misfit("vocabulary", own, base)
    elif not alike:
        log.warning("the draft's token embedding is not the base's: %s, or few tokens will be accepted", FIX)
    spare = draft.spare_head
    if spare is not None and head.ndim == 2 and head.shape[1] == size and not same_head(head, spare):
        log.warning("the draft's lm_head is not the base's, which is used: %s, or few tokens will be accepted", FIX)
    draft.spare_head = None


def check_family(family: str, model_type: str) -> None:
    """Raises `UserError` if the draft's ``model_type`` is not of the target's ``family`` (LLaVA or Qwen)."""
    if ("qwen" in family) != ("qwen" in model_type):
        raise misfit("family", model_type, family)


def misfit(what: str, own: object, base: object) -> UserError:
    """The error of a pair that does not fit."""
    return UserError(f"the draft does not fit the base model: {what} {own} in the draft, {base} in the base", fix=FIX)


def same_head(head: Tensor, spare: Tensor) -> bool:
    """Whether a draft's ``lm_head`` of any shape is a copy of the base's first rows [V, H]."""
    return spare.shape[1:] == head.shape[1:] and len(spare) > 0 and same_rows(head, spare)


@torch.no_grad()
def same_rows(table: Tensor, own: Tensor) -> bool:
    """Whether the draft's token embedding [V', H] is a copy of the base's first rows [V, H]. Compares `SAMPLE` rows.

    Weights on the meta device cannot be compared. They count as a copy if the sizes are equal.
    """
    if table.is_meta or own.is_meta:
        return len(table) == len(own)
    rows = torch.linspace(0, min(len(table), len(own)) - 1, SAMPLE).long()
    wanted, found = table[rows.to(table.device)].float().cpu(), own[rows.to(own.device)].float().cpu()
    return bool((found - wanted).norm() <= TOLERANCE * wanted.norm())


def extend(draft: DraftModel, rows: Tensor) -> None:
    """Appends ``rows`` [n, H] to the draft's token embedding."""
    own = draft.embed_tokens.weight
    joined = torch.cat([own.detach(), rows.detach().to(own)])  # [V, H]
    draft.embed_tokens = nn.Embedding.from_pretrained(joined, freeze=not own.requires_grad)
    draft.config = replace(draft.config, vocab_size=len(joined))

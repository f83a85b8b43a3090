"""Checks that a draft was trained for the base model it is loaded with."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from eagle.drafts.assistant import AssistantDraft
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.head import DraftHead
from eagle.drafts.msd import DraftModel
from eagle.drafts.mtp import MTPDraft
from eagle.drafts.vispec import ViSpecDraft
from eagle.families import Target
from llava.errors import UserError

SAMPLE = 64  # rows of the embedding that are compared
TOLERANCE = 0.1  # of their relative difference: rounding to 16 bit gives less than 0.01
FIX = "use the draft that was trained for this base model"
log = logging.getLogger(__name__)


def check_compatible(target: Target, draft: DraftHead) -> None:
    """Refuses a draft of another base model, and gives the draft what it uses of the target.

    Raises:
        UserError: sizes, vocabulary, layers or family differ.
    """
    if isinstance(draft, Eagle3Draft):
        check_eagle3(target, draft)
    elif isinstance(draft, MTPDraft):
        check_mtp(target, draft)
        draft.use_embedding(target.model.get_input_embeddings())
    elif isinstance(draft, AssistantDraft):
        check_assistant(target, draft)
        draft.use_embedding(target.model.get_input_embeddings())
    elif isinstance(draft, DraftModel):
        model = target.model
        check_tensors(target.family, model.get_input_embeddings().weight, model.get_output_embeddings().weight, draft)
    else:
        check_embedding(target.model.get_input_embeddings().weight, draft)
        check_image_ids(target, draft)


def check_eagle3(target: Target, draft: Eagle3Draft) -> None:
    """`check_compatible` for EAGLE-3 heads.

    Raises:
        UserError: sizes, vocabulary or layers differ.
    """
    check_eagle3_sizes(target, draft)
    table = cast(Tensor, target.model.get_input_embeddings().weight)  # [V, H]
    if draft.embed_tokens is None:
        draft.use_embedding(target.model.get_input_embeddings())
    elif draft.embed_tokens.weight.shape[1] == table.shape[1]:
        if same_rows(table, draft.embed_tokens.weight):
            complete(draft, table)
        else:
            log.warning("the draft's token embedding is not the base's: %s, unless it was trained", FIX)
    if draft.config.vocab_size != len(table):
        raise misfit("vocabulary", draft.config.vocab_size, len(table))


def check_eagle3_sizes(target: Target, draft: Eagle3Draft) -> None:
    """What `check_eagle3` checks without the data of tensors. Chooses the layers that the head reads. A head with its
    own embedding may have fewer tokens.

    Raises:
        UserError: sizes, vocabulary or layers differ.
    """
    config, hidden_size = draft.config, target.hidden_size
    vocabulary = len(target.model.get_input_embeddings().weight)
    if config.target_hidden_size != hidden_size:
        raise misfit("hidden size", config.target_hidden_size, hidden_size)
    shares = not (config.own_embedding and config.own_head) or config.image_rows == "feature"
    if shares and config.hidden_size != hidden_size:
        raise misfit("hidden size", config.hidden_size, hidden_size)
    if config.vocab_size != vocabulary and not (config.own_embedding and config.vocab_size < vocabulary):
        raise misfit("vocabulary", config.vocab_size, vocabulary)
    draft.use_target(len(target.text_model.layers))
    check_image_ids(target, draft)


def check_mtp(target: Target, draft: MTPDraft) -> None:
    """Raises `UserError` if an MTP layer is that of another base. One of the same sizes cannot be told apart."""
    text = target.config.get_text_config()
    names = {"model_type": "text model", "num_hidden_layers": "number of layers", "hidden_size": "hidden size"}
    for name, what in {**names, "vocab_size": "vocabulary"}.items():
        own, base = getattr(draft.base, name), getattr(text, name)
        if own != base:
            raise misfit(what, own, base)


def check_assistant(target: Target, draft: AssistantDraft) -> None:
    """Raises `UserError` if an assistant is that of another base. Chooses the layers whose keys and values it reads."""
    text, own = target.config.get_text_config(), draft.config
    for what, mine, theirs in (
        ("text model", own.model_type, text.model_type),
        ("hidden size", draft.assistant.backbone_hidden_size, text.hidden_size),
        ("vocabulary", own.vocab_size, text.vocab_size),
    ):
        if mine != theirs:
            raise misfit(what, mine, theirs)
    stored = {
        kind: index
        for index, (kind, mode) in enumerate(zip(text.layer_types, text.kv_sharing_modes, strict=True))
        if mode != "reuse"
    }  # the last one of each type
    for kind in dict.fromkeys(own.layer_types):
        if kind not in stored:
            raise misfit("layers", kind, "none")
        sizes = (own.per_layer_config[kind].num_key_value_heads, own.per_layer_config[kind].head_dim)
        if sizes != target.cache_shapes[stored[kind]]:
            raise misfit(f"key heads and their size in {kind}", sizes, target.cache_shapes[stored[kind]])
        if own.rope_parameters[kind] != text.rope_parameters[kind]:
            log.warning("the draft's rotary positions in %s are not the base's: %s", kind, FIX)
    draft.sources = {kind: stored[kind] for kind in dict.fromkeys(own.layer_types)}


def check_image_ids(target: Target, draft: DraftHead) -> None:
    """Raises `UserError` if the draft reads image tokens as embeddings, and one of the target's has none."""
    if isinstance(draft, Eagle3Draft) and draft.config.image_rows == "token":
        fix = 'set "image_rows": "feature" in section "msd" of its config.json'
    elif isinstance(draft, ViSpecDraft) and draft.embeds_image_ids:
        fix = 'leave "image_rows" out of section "msd" of its config.json'
    else:
        return
    largest = max(getattr(target.config, media.token) for media in target.media)
    if largest >= len(target.model.get_input_embeddings().weight):
        raise UserError(f"the draft reads image tokens as embeddings, but token {largest} has none", fix=fix)


def check_tensors(family: str, table: Tensor, head: Tensor, draft: DraftModel) -> None:
    """`check_compatible` for MSD drafts, which are of a family too, from the base's token embedding ``table`` [V, H]
    and ``lm_head`` [V, H] alone."""
    check_family(family, draft.config.model_type)
    check_embedding(table, draft)
    spare = draft.spare_head
    fits = head.ndim == 2 and head.shape[1] == draft.config.hidden_size
    if spare is not None and fits and not same_head(head, spare):
        log.warning("the draft's lm_head is not the base's, which is used: %s, or few tokens will be accepted", FIX)
    draft.spare_head = None


def check_embedding(table: Tensor, draft: DraftHead) -> None:
    """Compares a draft's token embedding with the base's ``table`` [V, H], of which it is a copy. A base may have more
    tokens than the draft, as the ``-hf`` releases of LLaVA do; the missing rows are copied from there.

    Raises:
        UserError: the hidden size or vocabulary differ.
    """
    assert draft.embed_tokens is not None
    (base, size), own = table.shape, draft.config.vocab_size
    if size != draft.config.hidden_size:
        raise misfit("hidden size", draft.config.hidden_size, size)
    alike = same_rows(table, draft.embed_tokens.weight)
    if own <= base and alike:
        complete(draft, table)
    elif own != base:
        raise misfit("vocabulary", own, base)
    elif not alike:
        log.warning("the draft's token embedding is not the base's: %s, or few tokens will be accepted", FIX)


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


def complete(draft: DraftHead, table: Tensor) -> None:
    """Gives the draft all rows of the base's token embedding [V, H], of which its own has the first ones. If these are
    equal to the last bit, both use one tensor: a copy would take 0.26 GB for LLaVA-1.5-7B, 1.09 GB for Qwen2-VL-7B.
    """
    assert draft.embed_tokens is not None
    own, base = draft.embed_tokens.weight, table.detach()
    like = (own.dtype, own.device) == (base.dtype, base.device) and not (own.is_meta or own.requires_grad)
    if like and torch.equal(own, base[: len(own)]):
        joined = base
    elif len(own) < len(base):
        joined = torch.cat([own.detach(), base[len(own) :].to(own)])
    else:
        return
    draft.embed_tokens = nn.Embedding.from_pretrained(joined, freeze=not own.requires_grad)
    draft.config = replace(draft.config, vocab_size=len(joined))

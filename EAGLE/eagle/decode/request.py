"""Checks of a request's inputs, before models see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from eagle.decode.generate_settings import check_settings
from eagle.families import Target
from llava.errors import UserError
from llava.generation import checked_settings

ID_TYPES = (torch.int64, torch.int32)


def check_request(
    target: Target, input_ids: Tensor, settings: GenerationConfig, streamer: Any, model_inputs: Mapping[str, Any]
) -> None:
    """Raises `UserError` for settings and inputs (``input_ids`` [B, P]) that speculative decoding does not support."""
    if model_inputs.get("inputs_embeds") is not None:
        raise UserError("inputs_embeds: MSD needs the ids of the prompt", fix="give input_ids and the pictures instead")
    check_settings(settings)
    checked_settings(vars(settings), vocabulary=target.vocab_size)
    check_inputs(target, input_ids, model_inputs.get("attention_mask"))
    if streamer is not None and input_ids.shape[0] > 1:
        raise UserError(
            f"a streamer for {input_ids.shape[0]} prompts: streamers print one answer",
            fix="generate one prompt at a time, or leave the streamer out",
        )


def check_inputs(target: Target, input_ids: Any, mask: Any) -> None:
    """Refuses prompts that are not [B, P] ids of the target's tokens, and a mask that does not belong to them."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in ID_TYPES:
        raise UserError(f"input_ids is {described(input_ids)}", fix="give whole numbers of shape [prompts, tokens]")
    if input_ids.numel() == 0:
        raise UserError(f"input_ids is {described(input_ids)}", fix="give at least one prompt of at least one token")
    tokens = target.model.get_input_embeddings().weight.shape[0]
    unknown = (input_ids < 0) | (input_ids >= tokens)  # [B, P]
    for media in target.media:  # their ids are not embedded
        unknown &= input_ids != getattr(target.config, media.token)
    if bool(unknown.any()):
        first = int(input_ids[unknown][0])
        raise UserError(f"input_ids has {first}, the model has tokens 0 to {tokens - 1}", fix="use its own tokenizer")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        fix = f"give the shape of input_ids, {tuple(input_ids.shape)}"
        raise UserError(f"attention_mask is {described(mask)}", fix=fix)
    check_mask(mask)


def check_mask(mask: Tensor) -> None:
    """Refuses an attention mask [B, P] with zeros that are not padding at an end of a sequence, and one without ones.

    transformers keeps masked tokens in windows, in the states of linear attention and in the text that processors see.
    The engine removes them.
    """
    ones = torch.nn.functional.pad(mask.bool(), (1, 0)).int()  # [B, 1 + P]
    runs = (ones.diff(dim=1) > 0).sum(dim=1)  # [B]
    if bool((runs != 1).any()):
        raise UserError(
            "attention_mask with zeros inside a prompt", fix="mask only the padding before or after a prompt"
        )


def described(value: Any) -> str:
    """
    >>> described(torch.zeros(1, 2)), described([1])
    ('float32 of shape (1, 2)', 'a list')
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"

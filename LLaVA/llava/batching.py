"""Rows of token ids to a batch: truncation, padding and tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from .errors import UserError
from .options import TextOptions

NO_LIMIT = 10**9
"""transformers gives tokenizers without a limit a larger `model_max_length`."""


@dataclass
class EncodedPrompt:
    """Ids of a prompt; for each one the characters (start, end) it stands for; and how many ids of begin-of-sequence
    are in front."""

    ids: list[int]
    spans: list[tuple[int, int]]
    begins: int

    def truncated(self, limit: int, side: str) -> EncodedPrompt:
        """The first ``limit`` ids, or the ids in front and the last ones with ``side`` "left"."""
        cut = max(len(self.ids) - limit, 0)
        if cut == 0:
            return self
        start = min(self.begins, limit)
        gone = slice(start, start + cut) if side == "left" else slice(limit, None)
        ids, spans = list(self.ids), list(self.spans)
        del ids[gone], spans[gone]
        return EncodedPrompt(ids, spans, start)


def make_batch(
    rows: Sequence[EncodedPrompt], options: TextOptions, tokenizer: Any, pad: int, image: int
) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` [B, S] and what else the options ask for, of encoded prompts.

    Args:
        tokenizer: for its limit and sides.
        pad: id to pad with.
        image: id of image tokens, which truncation does not cut.

    Raises:
        UserError: rows of different lengths are not padded, or truncation would cut through a picture.
    """
    limit = options.max_length
    if limit is None and tokenizer.model_max_length < NO_LIMIT:
        limit = tokenizer.model_max_length
    if options.truncates and limit is not None:
        whole, rows = rows, [row.truncated(limit, tokenizer.truncation_side) for row in rows]
        if any(row.ids.count(image) < each.ids.count(image) for row, each in zip(rows, whole, strict=True)):
            raise UserError(f"truncation to {limit} tokens would cut a picture", fix="give a larger max_length")
    elif options.padding is True and options.max_length is not None:
        warnings.warn("max_length has no effect with padding=True and without truncation", stacklevel=3)
    length = _padded_length([len(row.ids) for row in rows], options, limit)
    left = (options.padding_side or tokenizer.padding_side) == "left"

    def filled(values: Sequence[Any], filling: Any) -> list[Any]:
        more = [filling] * (length - len(values))
        return [*more, *values] if left else [*values, *more]

    data: dict[str, list[Any]] = {"input_ids": [filled(row.ids, pad) for row in rows]}
    if options.return_token_type_ids:
        data["token_type_ids"] = [[0] * len(ids) for ids in data["input_ids"]]
    if options.return_attention_mask:
        data["attention_mask"] = [filled([1] * len(row.ids), 0) for row in rows]
    if options.return_special_tokens_mask:
        marks = [[int(place < row.begins) for place in range(len(row.ids))] for row in rows]
        data["special_tokens_mask"] = [filled(row, 1) for row in marks]
    if options.return_offsets_mapping:
        data["offset_mapping"] = [filled(row.spans, (0, 0)) for row in rows]
    if options.return_length:
        data["length"] = [len(ids) for ids in data["input_ids"]]
    if options.return_mm_token_type_ids:
        data["mm_token_type_ids"] = [filled([int(each == image) for each in row.ids], 0) for row in rows]
    if options.return_tensors is None:
        return data
    if len({len(row) for row in data["input_ids"]}) > 1:
        raise UserError("prompts of different lengths cannot be one tensor", fix="give padding=True")
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in data.items()}
    return {name: as_tensors(value, options.return_tensors) for name, value in tensors.items()}


def as_tensors(values: torch.Tensor, kind: Literal["pt", "np"] | None) -> torch.Tensor | np.ndarray | list[np.ndarray]:
    """A tensor in the form that ``return_tensors`` asks for."""
    return values if kind == "pt" else values.numpy() if kind == "np" else list(values.numpy())


def _padded_length(lengths: Sequence[int], options: TextOptions, limit: int | None) -> int:
    """The length to pad to; 0 for none.

    Raises:
        UserError: padding to a multiple would exceed the length to truncate to.
    """
    if options.padding in (False, "do_not_pad") or (options.padding is None and options.return_tensors is None):
        return 0
    length = max(lengths, default=0)
    if options.padding == "max_length" and limit is not None:
        length = max(length, limit)
    multiple = options.pad_to_multiple_of or 1
    padded = -(-length // multiple) * multiple
    if options.truncates and limit is not None and padded > limit:
        raise UserError(f"max_length={limit} is not a multiple of pad_to_multiple_of={multiple}", fix="change one")
    return padded

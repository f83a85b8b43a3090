"""Rows of token ids to a batch: truncation, padding and tensors, with the options of transformers' processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from .errors import UserError
from .strict import read_strict, strict_dataclass

NO_LIMIT = 10**9
"""transformers gives tokenizers without a limit a larger `model_max_length`."""
GROUPS = ("text_kwargs", "common_kwargs")
NO_EFFECT = (("return_token_type_ids", False), ("verbose", True), ("verbose", False))
"""Options with values that change nothing here."""


@strict_dataclass
class BatchOptions:
    """Options of a call of `LlavaProcessor`, with the names and meanings of transformers' processors.

    Attributes:
        padding: None pads where prompts have different lengths. True and "longest" pad to the longest row.
        return_tensors: "pt", "np", or None for lists.
        padding_side: None for the tokenizer's.
    """

    padding: bool | Literal["longest", "max_length", "do_not_pad"] | None = None
    truncation: bool | Literal["longest_first", "only_first", "do_not_truncate"] = False
    max_length: int | None = Field(None, ge=1)
    pad_to_multiple_of: int | None = Field(None, ge=1)
    padding_side: Literal["left", "right"] | None = None
    return_tensors: Literal["pt", "np"] | None = "pt"
    add_special_tokens: bool = True
    return_attention_mask: bool = True
    return_mm_token_type_ids: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> BatchOptions:
        """Options as a caller of a processor gives them, also in ``text_kwargs`` and ``common_kwargs``.

        Raises:
            UserError: an option is unknown, or has a wrong value.
        """
        if given.get("images_kwargs"):
            fix = "set them on processor.image_processor"
            raise UserError("images_kwargs are not supported", ", ".join(given["images_kwargs"]), fix)
        flat = {name: value for name, value in given.items() if name not in (*GROUPS, "images_kwargs")}
        for group in GROUPS:
            flat |= given.get(group) or {}
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in flat.items()}
        set_ones = {name: value for name, value in plain.items() if value is not None or name == "return_tensors"}
        kept = {name: value for name, value in set_ones.items() if (name, value) not in NO_EFFECT}
        return read_strict(cls, kept, "options of the processor")

    @property
    def truncates(self) -> bool:
        return self.truncation not in (False, "do_not_truncate")


def make_batch(
    rows: Sequence[list[int]], options: BatchOptions, tokenizer: Any, pad: int, image: int
) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` [B, S] of rows of ids, as the options ask for.

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
        rows = [_truncated(row, limit, tokenizer.truncation_side, image) for row in rows]
    length = _padded_length(rows, options, limit)
    left = (options.padding_side or tokenizer.padding_side) == "left"

    def filled(values: list[int], filling: int) -> list[int]:
        more = [filling] * (length - len(values))
        return [*more, *values] if left else [*values, *more]

    data = {"input_ids": [filled(row, pad) for row in rows]}
    if options.return_attention_mask:
        data["attention_mask"] = [filled([1] * len(row), 0) for row in rows]
    if options.return_mm_token_type_ids:
        data["mm_token_type_ids"] = [filled([int(each == image) for each in row], 0) for row in rows]
    if options.return_tensors is None:
        return data
    if len({len(row) for row in data["input_ids"]}) > 1:
        raise UserError("prompts of different lengths cannot be one tensor", fix="give padding=True")
    tensors = {name: torch.tensor(values, dtype=torch.int64).reshape(len(rows), -1) for name, values in data.items()}
    return {name: as_tensors(value, options.return_tensors) for name, value in tensors.items()}


def as_tensors(values: torch.Tensor, kind: Literal["pt", "np"] | None) -> torch.Tensor | np.ndarray | list[np.ndarray]:
    """A tensor in the form that ``return_tensors`` asks for."""
    return values if kind == "pt" else values.numpy() if kind == "np" else list(values.numpy())


def _truncated(row: list[int], limit: int, side: str, image: int) -> list[int]:
    kept, cut = (row[-limit:], row[:-limit]) if side == "left" else (row[:limit], row[limit:])
    if image in cut:
        raise UserError(f"truncation to {limit} tokens would cut a picture", fix="give a larger max_length")
    return kept


def _padded_length(rows: Sequence[list[int]], options: BatchOptions, limit: int | None) -> int:
    """The length to pad to; 0 for none."""
    if options.padding in (False, "do_not_pad") or (options.padding is None and options.return_tensors is None):
        return 0
    length = max((len(row) for row in rows), default=0)
    if options.padding == "max_length" and limit is not None:
        length = max(length, limit)
    multiple = options.pad_to_multiple_of or 1
    return -(-length // multiple) * multiple

"""Attention kernels: which ones PyTorch may choose, and tree attention in two parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE_ATTENTION = "msd_tree"
"""Name of `tree_attention` in transformers."""
HALF = (torch.float16, torch.bfloat16)
OTHER_SETTINGS = ("softcap", "s_aux", "position_bias")
"""Arguments of attention that change its scores. Two parts do not know them."""
MASKS_OF_THEIR_OWN = ("minimax_m3_vl_text",)
"""Text models whose layers close more of the mask, only with "sdpa" or "eager"."""


def leave_out_cudnn_attention() -> None:
    """Disables cuDNN's kernel for `scaled_dot_product_attention` in this process. Newer GPUs prefer it.

    cuDNN makes a plan for each new shape and stride of queries, keys and mask, which takes tens of milliseconds on the
    host. A draft tree on a growing cache has new shapes in each cycle and at each level. (Reported for H100; not
    measured here.)
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class TwoParts:
    """Argument ``two_parts`` of a text model's forward over a tree: asks its layers for attention in two parts.

    ``mask``: [B, 1, N, T] additive, of layers that see everything; a layer with another one is masked as usual.
    ``prefix``: number of columns, at least one, that are open in every row.
    """

    mask: Tensor
    prefix: int

    def fits(self, mask: Tensor, settings: Mapping[str, Any]) -> bool:
        """Whether a layer with this mask and these arguments of attention can use two parts."""
        if any(settings.get(name) is not None for name in OTHER_SETTINGS):
            return False
        return mask is self.mask or (mask.data_ptr() == self.mask.data_ptr() and mask.shape == self.mask.shape)


def takes_two_parts(text_model: nn.Module) -> bool:
    """Whether a text model has "sdpa" and hands arguments that it does not know to its layers' attention."""
    config: Any = text_model.config
    arguments = signature(type(text_model).forward).parameters.values()
    return (
        config._attn_implementation in ("sdpa", TREE_ATTENTION)
        and config.model_type not in MASKS_OF_THEIR_OWN
        and any(each.kind is each.VAR_KEYWORD for each in arguments)
    )


@contextmanager
def with_tree_attention(config: Any) -> Iterator[None]:
    """Within it, the layers of a text model call `tree_attention` instead of "sdpa". Other threads that use the model
    meanwhile get the same results from either."""
    config._attn_implementation = TREE_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    two_parts: TwoParts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of tree nodes in two parts if they are asked for and fit; otherwise transformers' "sdpa"."""
    if two_parts is None or attention_mask is None or not two_parts.fits(attention_mask, kwargs):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    found = two_part_attention(query, key, value, attention_mask, two_parts.prefix, scaling)
    return found.transpose(1, 2).contiguous(), None


def two_part_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: int, scale: float | None = None
) -> Tensor:
    """Masked attention whose first ``prefix`` columns are open in every row: those without a mask, the others with it,
    joined by their log-sum-exp. Heads that share keys are rows of one head, so keys are not repeated.

    Args:
        query: [B, heads, N, D].
        key, value: [B, key heads, T, D].
        mask: [B, 1, N, T] additive.

    Returns:
        [B, heads, N, D]
    """
    batch, heads, nodes, width = query.shape
    grouped = (batch, key.shape[1], heads // key.shape[1] * nodes)
    rows = query.reshape(*grouped, width)  # [B, key heads, heads of a group * N, D]
    scale = width**-0.5 if scale is None else scale
    block = mask[..., prefix:].expand(-1, heads // key.shape[1], -1, -1)  # [B, heads of a group, N, T - prefix]
    block = block.reshape(batch, 1, grouped[2], -1)
    seen, seen_sum = open_attention(rows, key[:, :, :prefix], value[:, :, :prefix], scale)
    own, own_sum = plain_attention(rows, key[:, :, prefix:], value[:, :, prefix:], scale, block)
    share = torch.sigmoid(own_sum - seen_sum).unsqueeze(-1)  # [..., 1] weight of the tree's part
    return torch.lerp(seen.float(), own, share).to(query.dtype).view(batch, heads, nodes, -1)


def open_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of query rows [B, h, n, D] over keys and values [B, h, m, D] without a mask: outputs [B, h, n, D], and
    the log-sum-exp of each row's scores, [B, h, n] in float32. With a fused kernel if there is one that gives both."""
    if query.shape[-1] == value.shape[-1]:
        if query.device.type == "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
        if query.device.type == "cuda" and query.dtype in HALF and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    return plain_attention(query, key, value, scale)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`open_attention` in float32 by its definition, with an additive ``mask`` if given."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    total = scores.logsumexp(dim=-1)  # [B, heads, N]
    return (scores - total.unsqueeze(-1)).exp() @ value.float(), total


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)

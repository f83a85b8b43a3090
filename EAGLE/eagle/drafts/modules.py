"""Building blocks of draft heads: norms, rotary positions, attention, feed-forward, and the decoder layer of them."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from eagle.kv_cache import KVCache
from eagle.weight_layout import input_major


class LayerSizes(Protocol):
    """What a layer reads of a draft's config."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def attention_bias(self) -> bool: ...


def capped(logits: Tensor, cap: float) -> Tensor:
    """Logits [..., V] between ``-cap`` and ``cap``, in the operations and their order of transformers."""
    return torch.tanh(logits / cap) * cap


def top_children(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` most probable next tokens of each row.

    NaN becomes the lowest log-probability, -inf, so that a child never scores above its parent.

    Args:
        logits: [..., V].

    Returns:
        Ids and log-probabilities, [..., k] each.
    """
    logits = logits.float()  # [..., V]
    values, ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)  # [..., k]
    logprobs = values - logits.logsumexp(dim=-1, keepdim=True)
    return ids, logprobs.masked_fill(logprobs.isnan(), -math.inf)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """The rows [B, R] of ``x`` [B, S, ...], [B, R, ...]; the last one where a number is past the end."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), rows.clamp(max=x.shape[1] - 1)]


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., H] → [..., H]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def fuse_linears(*layers: nn.Linear) -> nn.Linear:
    """One linear layer that computes all of ``layers`` in one product.

    The given layers become views of its weights, so no memory is added and state dicts do not change.
    """
    bias = layers[0].bias is not None
    fused = nn.utils.skip_init(
        nn.Linear, layers[0].in_features, sum(layer.out_features for layer in layers), bias=bias,
        device=layers[0].weight.device, dtype=layers[0].weight.dtype,
    )  # fmt: skip
    fused.requires_grad_(False)
    fused.weight.data = input_major(torch.cat([layer.weight for layer in layers]))
    if bias:
        fused.bias.data = torch.cat([layer.bias for layer in layers])
    start = 0
    for layer in layers:
        end = start + layer.out_features
        layer.weight.data = fused.weight.data[start:end]
        if bias:
            layer.bias.data = fused.bias.data[start:end]
        start = end
    return fused


class Rotary(nn.Module):
    """Rotary angles. With ``mrope_section``, three position rows (time, height, width) share the frequencies: in
    sections one after the other as in Qwen2-VL, or interleaved as in Qwen3-VL."""

    inv_freq: Tensor

    def __init__(
        self, head_dim: int, theta: float, mrope_section: tuple[int, ...] | None, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.mrope_section, self.interleaved = head_dim, theta, mrope_section, interleaved
        self.register_buffer("inv_freq", self._frequencies(torch.device("cpu")), persistent=False)

    def _frequencies(self, device: torch.device) -> Tensor:
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / self.theta ** (steps / self.head_dim)  # [D/2]

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``position_ids`` [B, S], or [3, B, S] for M-RoPE → cos and sin, [B, 1, S, D] each."""
        if self.inv_freq.dtype != torch.float32:  # a module-wide .to(16 bit) must not coarsen the angles
            self.inv_freq = self._frequencies(self.inv_freq.device)
        angles = position_ids.unsqueeze(-1).float() * self.inv_freq  # [(3,) B, S, D/2]
        if angles.dim() == 4:
            angles = angles.gather(0, self._rows(angles.device).expand(1, *angles.shape[1:]))[0]  # [B, S, D/2]
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)  # [B, 1, S, D]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _rows(self, device: torch.device) -> Tensor:
        """[D/2] the position row that each frequency takes."""
        count, sections = self.head_dim // 2, self.mrope_section or (self.head_dim // 2,)
        if not self.interleaved:
            return torch.tensor([row % 3 for row, size in enumerate(sections) for _ in range(size)], device=device)
        rows = torch.arange(count, device=device) % 3
        ends = torch.tensor([3 * size for size in sections], device=device)[rows]
        return torch.where(torch.arange(count, device=device) < ends, rows, 0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary angles. ``x`` [B, heads, S, D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def chosen_rows(x: Tensor, last_only: bool, kept: Tensor | None) -> Tensor:
    """``x`` [B, S, H], its last row alone, or the rows ``kept`` [B, R] alone."""
    if last_only:
        return x[:, -1:]
    return x if kept is None else take(x, kept)


class Attention(nn.Module):
    """Grouped-query attention through `scaled_dot_product_attention`.

    Args:
        index: of the layer, in the cache.
        input_size: width of the input rows. None is the hidden size.
        output_bias: whether ``o_proj`` has one.
        head_norm: whether queries and keys are normalised for each head, before the rotation.
    """

    def __init__(
        self,
        config: LayerSizes,
        index: int = 0,
        input_size: int | None = None,
        output_bias: bool = False,
        head_norm: bool = False,
    ) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        wide, narrow = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        size, bias = input_size or config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, wide, bias=bias)
        self.k_proj = nn.Linear(size, narrow, bias=bias)
        self.v_proj = nn.Linear(size, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if head_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if head_norm else None
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.fused: list[nn.Linear] = []  # a list, so that it is not a submodule and not in the state dict

    def fuse(self) -> None:
        """Joins the three projections of the input (`fuse_linears`)."""
        self.fused = [fuse_linears(self.q_proj, self.k_proj, self.v_proj)]

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of ``x`` [B, S, H], one after the other: [B, heads + 2 KV heads, S, D]."""
        parts = self.fused or (self.q_proj, self.k_proj, self.v_proj)
        joined = torch.cat([part(x) for part in parts], dim=-1) if len(parts) > 1 else parts[0](x)
        return joined.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        cache: KVCache | None,
        last_only: bool = False,
        kept: Tensor | None = None,
    ) -> Tensor:
        """``x`` [B, S, input size] → [B, S, H], of the last row alone [B, 1, H], of the rows ``kept`` [B, R] alone
        [B, R, H]. ``mask`` [B or 1, 1, S, past + S], bool or additive."""
        batch, rows, _ = x.shape
        joined = self.project(x)
        value = joined[:, self.heads + self.kv_heads :]  # [B, KV heads, S, D]
        unrotated = joined[:, : self.heads + self.kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            parts = self.q_norm(unrotated[:, : self.heads]), self.k_norm(unrotated[:, self.heads :])
            unrotated = torch.cat(parts, dim=1)
        rotated = rotate(unrotated, *rope)
        query, key = rotated[:, : self.heads], rotated[:, self.heads :]
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        if last_only:  # without a mask it sees all rows
            query, rows, causal = query[:, :, -1:], 1, False
            mask = None if mask is None else mask[:, :, -1:]
        elif kept is not None:
            query, rows, causal = take(query.transpose(1, 2), kept).transpose(1, 2), kept.shape[1], False
            if mask is None:
                mask = (torch.arange(key.shape[2], device=key.device) <= kept.unsqueeze(-1)).unsqueeze(1)
            else:
                mask = take(mask.expand(batch, -1, -1, -1).transpose(1, 2), kept).transpose(1, 2)
        if self.groups > 1 and cache is not None and not causal:
            # the heads of a group as further rows, so that a long cache is not copied for each of them
            query = query.reshape(batch, self.kv_heads, self.groups * rows, self.head_dim)
            mask = None if mask is None else mask.repeat(1, 1, self.groups, 1)
        elif self.groups > 1:
            key, value = (t.repeat_interleave(self.groups, dim=1) for t in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        out = out.reshape(batch, self.heads, rows, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1))


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: LayerSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.fused: list[nn.Linear] = []

    def fuse(self) -> None:
        """Joins the two projections of the input (`fuse_linears`)."""
        self.fused = [fuse_linears(self.gate_proj, self.up_proj)]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, S, H] → [B, S, H]."""
        if self.fused:
            gate, up = self.fused[0](x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act(gate) * up)


class DraftLayer(nn.Module):
    """One decoder layer.

    Args:
        index: of the layer, in the cache.
        input_norm: False leaves out ``input_layernorm``.
        output_bias, head_norm: as for `Attention`.
    """

    def __init__(
        self,
        config: LayerSizes,
        index: int = 0,
        input_norm: bool = True,
        output_bias: bool = False,
        head_norm: bool = False,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if input_norm else nn.Identity()
        self.self_attn = Attention(config, index, None, output_bias, head_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        cache: KVCache | None,
        last_only: bool = False,
        kept: Tensor | None = None,
    ) -> Tensor:
        """``x`` [B, S, H] → [B, S, H], of the last row alone [B, 1, H], of the rows ``kept`` [B, R] alone
        [B, R, H]."""
        attended = self.self_attn(self.input_layernorm(x), rope, mask, causal, cache, last_only, kept)
        x = chosen_rows(x, last_only, kept) + attended
        return x + self.mlp(self.post_attention_layernorm(x))

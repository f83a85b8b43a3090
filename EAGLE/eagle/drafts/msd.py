"""The multimodal draft head: fusion, the decoupled image path and one decoder layer.

Notation: target prefix ``x_1..x_L`` with hidden states ``h_1..h_L`` after the target's final norm. Row ``t`` of the
draft's input predicts ``h_{t+1}``, from which the target's own ``lm_head`` predicts ``x_{t+2}``:

==============================  ==========================================================
next token ``x_{t+1}``          input row ``t``
==============================  ==========================================================
text                            ``fc([E(x_{t+1}) ; h_t])``
image (decoupled)               the projected image feature of ``x_{t+1}``; no fc, no h_t
==============================  ==========================================================

Source: arXiv 2505.14260, section 3 (decoupled inputs), on the one-layer head of EAGLE (arXiv 2401.15077). There is no
final norm. State-dict keys are those of the published checkpoints. A draft whose config says ``"decoupled": false`` has
``fc([image feature ; h_t])`` in image rows too: what the paper compares with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from eagle.drafts.config import DraftConfig
from eagle.kv_cache import KVCache
from eagle.weight_layout import input_major, to_input_major_layout


def capped(logits: Tensor, cap: float) -> Tensor:
    """Logits between ``-cap`` and ``cap``, in the operations and their order of transformers."""
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


class Attention(nn.Module):
    """Grouped-query attention through `scaled_dot_product_attention`."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        wide, narrow = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, wide, bias=bias)
        self.k_proj = nn.Linear(size, narrow, bias=bias)
        self.v_proj = nn.Linear(size, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, size, bias=False)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.fused: list[nn.Linear] = []  # a list, so that it is not a submodule and not in the state dict

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
    ) -> Tensor:
        """``x`` [B, S, H] → [B, S, H], of the last row alone [B, 1, H]. ``mask`` [B or 1, 1, S, past + S], bool or
        additive."""
        batch, rows, _ = x.shape
        joined = self.project(x)
        value = joined[:, self.heads + self.kv_heads :]  # [B, KV heads, S, D]
        rotated = rotate(joined[:, : self.heads + self.kv_heads], *rope)
        query, key = rotated[:, : self.heads], rotated[:, self.heads :]
        if cache is not None:
            key, value = cache.update(key, value, 0)
        if last_only:  # it sees all rows, so it needs no mask
            query, rows, mask, causal = query[:, :, -1:], 1, None, False
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

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.fused: list[nn.Linear] = []

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, S, H] → [B, S, H]."""
        if self.fused:
            gate, up = self.fused[0](x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act(gate) * up)


class DraftLayer(nn.Module):
    """One decoder layer; without ``input_layernorm`` in the LLaVA layout."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) if config.input_layernorm else nn.Identity()
        )
        self.self_attn = Attention(config)
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
    ) -> Tensor:
        """``x`` [B, S, H] → [B, S, H], of the last row alone [B, 1, H]."""
        attended = self.self_attn(self.input_layernorm(x), rope, mask, causal, cache, last_only)
        x = (x[:, -1:] if last_only else x) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftModel(nn.Module):
    """The draft head. Its state dict has exactly the keys of the published checkpoints."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.mrope_section, config.mrope_interleaved)
        self.draft_vocab: Tensor | None = None  # [K] ids of the trimmed vocabulary; None is all of it
        self.spare_head: Tensor | None = None  # [V, H] an lm_head in the checkpoint, to be compared with the base's
        self._draft_vocab_head: Tensor | None = None  # [K, H] the head's rows of these tokens
        self._cap: float | None = None  # of the target's logits

    @property
    def layer(self) -> DraftLayer:
        """The one decoder layer."""
        return cast(DraftLayer, self.layers[0])

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def fuse(self, hidden: Tensor, next_embeds: Tensor, next_is_image: Tensor | None = None) -> Tensor:
        """Input rows of the layer, as in the table above.

        Args:
            hidden: [B, S, H] target (or predicted) hidden state ``h_t``.
            next_embeds: [B, S, H] ``E(x_{t+1})``, or the projected image feature where ``x_{t+1}`` is an image token.
            next_is_image: [B, S] bool; None if no row is an image row.
        """
        text = self.fc(torch.cat([next_embeds, hidden], dim=-1))  # [B, S, H]
        if next_is_image is None or not self.config.options.decoupled:
            return text
        return torch.where(next_is_image.unsqueeze(-1), next_embeds, text)

    def prepare_for_decoding(self, head: nn.Module | None = None, cap: float | None = None) -> DraftModel:
        """Fuses the projections that read the same input, changes the memory layout of the weights
        (`eagle.weight_layout`), and copies the rows of the target's ``lm_head`` that a trimmed vocabulary needs. Call
        it once, after loading. Training does not need it. ``cap``: of the target's logits."""
        self._cap = cap
        if self.draft_vocab is not None and head is not None:
            self.draft_vocab = self.draft_vocab.to(self.device)
            weight = cast(Tensor, head.weight)
            self._draft_vocab_head = input_major(weight[self.draft_vocab.to(weight.device)].to(self.device, self.dtype))
        to_input_major_layout(self)
        attention, mlp = self.layer.self_attn, self.layer.mlp
        attention.fused = [fuse_linears(attention.q_proj, attention.k_proj, attention.v_proj)]
        mlp.fused = [fuse_linears(mlp.gate_proj, mlp.up_proj)]
        return self.eval().requires_grad_(False)

    def likely_next(self, hidden: Tensor, top_k: int, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The ``top_k`` most probable next tokens.

        Args:
            hidden: [..., H] predicted hidden states.
            head: the target's ``lm_head``. A draft with a trimmed vocabulary uses its copy of the head's rows instead,
                and its probabilities are normalised over these tokens.

        Returns:
            Ids and log-probabilities, [..., k] each, on the device of ``hidden``.
        """
        if self._draft_vocab_head is None or self.draft_vocab is None:
            ids, logprobs = top_children(head(hidden), top_k)
        else:
            logits = F.linear(hidden, self._draft_vocab_head)
            indices, logprobs = top_children(logits if self._cap is None else capped(logits, self._cap), top_k)
            ids = self.draft_vocab.to(indices.device)[indices]
        return ids.to(hidden.device), logprobs.to(hidden.device)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Predicted hidden states [B, S, H].

        Args:
            x: [B, S, H] rows of `fuse`.
            position_ids: [B, S], or [3, B, S] for a draft with M-RoPE positions; ignored if ``rope`` is given.
            attention_mask: [B or 1, 1, S, past + S], bool (true = may look) or additive; None is plain causal, which
                after cached rows is allowed for a single row only.
            cache: rows seen before; this call's rows are appended.
            rope: cosines and sines of the rows from `Rotary`, if the caller has them already.
            last_only: caches all rows, but computes only the last one's hidden state, [B, 1, H]. For the prompt, where
                no row is masked.
        """
        rope = self.rotary(position_ids, x.dtype) if rope is None else rope
        causal = attention_mask is None and x.shape[1] > 1
        return self.layer(x, rope, attention_mask, causal, cache, last_only)

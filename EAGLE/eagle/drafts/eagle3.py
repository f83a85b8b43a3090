"""EAGLE-3 heads (arXiv 2503.01840), as SafeAILab, SpecForge, AngelSlim, ModelOpt and speculators publish them.

Row ``t``, with the streams ``r_a, r_b, r_c`` that enter three layers of the target at token ``t``:

1. ``f = fc([r_a ; r_b ; r_c])``, for true features only;
2. ``q, k, v = W [input_layernorm(E(x_{t+1})) ; hidden_norm(f)]``;
3. ``y = f + attention``, ``z = y + mlp(post_attention_layernorm(y))``. The embedding is not in the residual;
4. logits over the head's own vocabulary: ``lm_head(norm(z))``;
5. ``z`` takes the place of ``f`` in the row of the drafted token.

With ``image_tokens`` the rows of a picture are merged first (`eagle.drafts.compression`): a merged row has the mean of
their streams, and what stands for the next token is the mean of their image features, or the image token's embedding.

Further layers are ordinary ones. Where implementations differ, `eagle.drafts.eagle3_config` has the choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from eagle.drafts.compression import Compression
from eagle.drafts.eagle3_config import Eagle3Config
from eagle.drafts.head import Prompt, PromptRows, TrainedHead
from eagle.drafts.modules import MLP, Attention, DraftLayer, RMSNorm, Rotary, chosen_rows
from eagle.kv_cache import KVCache
from llava.errors import UserError


class FirstLayer(nn.Module):
    """The layer that reads the next token's embedding beside the features."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.self_attn = Attention(config, 0, 2 * size, config.output_bias, config.query_norm)
        self.post_attention_layernorm = RMSNorm(size, eps)
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
        """``x`` [B, S, 2 H], embeddings and features → [B, S, H], of the last row alone [B, 1, H], of the rows
        ``kept`` [B, R] alone [B, R, H]."""
        embeds, features = x.chunk(2, dim=-1)
        normed = self.hidden_norm(features)
        joined = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        attended = self.self_attn(joined, rope, mask, causal, cache, last_only, kept)
        residual = normed if self.norm_before_residual else features
        y = chosen_rows(residual, last_only, kept) + attended
        return y + self.mlp(self.post_attention_layernorm(y))


class Eagle3Draft(TrainedHead):
    """An EAGLE-3 head. `eagle.drafts.checkpoint` gives the tensors of all layouts the same names."""

    kind = "EAGLE-3"
    config: Eagle3Config

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        size, width = config.hidden_size, config.features * config.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if config.own_embedding else None
        self.input_norm = RMSNorm(width, config.rms_norm_eps) if config.norm_before_fc else nn.Identity()
        norms = [RMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in range(config.features)]
        self.fc_norm = nn.ModuleList(norms if config.fc_norm else [])
        self.fc = nn.Linear(width, size, bias=config.fc_bias)
        further = [
            DraftLayer(config, index, True, config.output_bias, config.query_norm)
            for index in range(1, config.num_hidden_layers)
        ]
        self.layers = nn.ModuleList([FirstLayer(config), *further])
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False) if config.own_head else None
        self.rotary = self.new_rotary()
        self.window = config.window

    def new_rotary(self) -> Rotary:
        config = self.config
        return Rotary(config.head_dim, config.rope_theta, config.mrope_section, config.mrope_interleaved)

    @property
    def compression(self) -> Compression:
        return Compression(self.config.image_tokens)

    @property
    def positions(self) -> Literal["plain", "temporal", "mrope"]:
        return self.config.positions

    @property
    def embeds_image_ids(self) -> bool:
        return self.config.image_rows == "token"

    def conventions(self) -> str:
        config = self.config
        layers = config.target_layers
        read = "default layers of the target" if layers is None else f"layers {', '.join(map(str, layers))}"
        kept = "all" if config.image_tokens is None else f"at most {config.image_tokens} of a picture, merged"
        positions: str = config.positions
        if positions == "mrope":
            positions += " interleaved" if config.mrope_interleaved else " sectioned"
        return "; ".join(
            [
                f"{config.layout} layout",
                f"reads the inputs of {read}",
                f"positions {positions}, rope base {config.rope_theta:g}",
                f"image rows: {config.image_rows}, {kept}",
                f"residual {'after' if config.norm_before_residual else 'before'} hidden_norm",
                f"output fed back {config.feedback} the final norm",
                f"{'final norm' if config.head_norm else 'no norm'} before lm_head",
                f"embedding: {'own' if config.own_embedding else 'of the target'}",
                f"lm_head: {'own' if config.own_head else 'of the target'}",
                f"vocabulary {config.draft_vocab_size} of {config.vocab_size}",
                "attention to " + ("all rows" if config.window is None else f"{config.window} rows"),
            ]
        )

    def use_target(self, layers: int) -> None:
        """Chooses the features for a target of so many layers.

        Raises:
            UserError: it has not the layers that the head reads.
        """
        self.target_layers = self.config.layers_of(layers)

    def read_prompt(self, prompt: Prompt, compression: Compression) -> PromptRows:
        plan = compression.plan(prompt.next_is_image[0])
        if plan is not None:
            streams = plan.mean(prompt.features[0])[None].to(prompt.features.dtype)
            prompt = prompt.merged(plan)._replace(features=streams)
        hidden, embeds = self.condense(prompt.features), self.embed(prompt.next_ids)
        if self.config.image_rows == "feature":
            embeds = torch.where(prompt.next_is_image.unsqueeze(-1), prompt.next_embeds.to(embeds.dtype), embeds)
        x = self.fuse(hidden, embeds)  # [1, S, 2 H]
        if self.config.positions == "plain":
            return PromptRows(x)
        positions = prompt.positions
        if self.config.positions == "temporal" and positions.ndim == 3:
            positions = positions[0]
        return PromptRows(x, positions, int(prompt.next_position))

    def text_rows(self, hidden: Tensor, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        return self.fuse(hidden, self.embed(tokens))

    def fuse(self, hidden: Tensor, next_embeds: Tensor, next_is_image: Tensor | None = None) -> Tensor:
        return torch.cat([next_embeds, hidden], dim=-1)

    def condense(self, features: Tensor) -> Tensor:
        """``fc`` of the streams, [B, n, features * Ht] → [B, n, H]."""
        if len(self.fc_norm):
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(self.input_norm(features))

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) if self.config.head_norm and self.config.feedback == "before" else hidden

    def after_layers(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.config.feedback == "after" else x


def draft_vocabulary(d2t: Tensor | None, t2d: Tensor | None, config: Eagle3Config) -> Tensor | None:
    """Ids [K] of a trimmed vocabulary. None if it is not trimmed.

    Args:
        d2t: [K] what to add to a token's number in the draft's vocabulary to get its id.
        t2d: [V] bool, true for the ids in the draft's vocabulary.

    Raises:
        UserError: the tensors do not fit the config or each other.
    """
    count, vocabulary = config.draft_vocab_size, config.vocab_size
    if d2t is None:
        if count != vocabulary:
            raise UserError(f"missing d2t: config.json has a vocabulary of {count} of {vocabulary} tokens")
        return None
    if tuple(d2t.shape) != (count,) or d2t.is_floating_point():
        raise UserError(f"d2t is {d2t.dtype} {list(d2t.shape)}, config.json says {count} whole numbers")
    ids = torch.arange(count) + d2t.long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary or len(ids.unique()) < count:
        raise UserError(f"d2t does not lead to {count} different ids of a vocabulary of {vocabulary}")
    if t2d is not None:
        own = torch.zeros(vocabulary, dtype=torch.bool)
        own[ids] = True
        if tuple(t2d.shape) != (vocabulary,) or not torch.equal(t2d.bool(), own):
            raise UserError("t2d does not have the ids that d2t leads to")
    return ids


def vocabulary_tensors(ids: Tensor, size: int) -> dict[str, Tensor]:
    """The tensors ``d2t`` and ``t2d`` of a trimmed vocabulary, ``ids`` [K] ascending of ``size``; see
    `draft_vocabulary`."""
    return {"d2t": ids - torch.arange(len(ids)), "t2d": torch.zeros(size, dtype=torch.bool).index_fill(0, ids, True)}

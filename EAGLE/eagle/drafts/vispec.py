"""ViSpec's heads (arXiv 2509.15235): an EAGLE head that reads a few learnt rows for each picture.

Row ``t``, with the target's hidden state ``h_t`` after its final norm:

1. Text: ``fc([E(x_{t+1}) ; img_fc([h_t ; g])])``. ``g`` is a global vector of the last picture, zeros before the first.
2. The rows of a picture attend to its features with learnt queries. All of the results but the last, at most as many as
   there are features, enter the layer as they are, without ``fc`` and ``h_t``. The last is ``g`` from then on, also for
   the whole answer.

Pictures without a token between them count as one. Positions are plain and those of the whole prompt: the rows of a
picture have the last ones of its features. There is no final norm, and the target's ``lm_head`` is used.

`eagle.train.vispec` trains them, on the rows that `ViSpecDraft.next_embeds` makes in decoding too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle.drafts.compression import Compression, query_rows
from eagle.drafts.config import VISPEC, ViSpecConfig
from eagle.drafts.head import Prompt, PromptRows, TrainedHead
from eagle.drafts.modules import DraftLayer, Rotary
from llava.errors import UserError

QUERIES = "imadpt.q"


class Compressor(nn.Module):
    """Learnt queries that attend to the features of a picture.

    Args:
        queries: number of queries.
        heads: of the attention.
        bias: whether keys and values have one.
    """

    def __init__(self, size: int, queries: int, heads: int, bias: bool) -> None:
        super().__init__()
        head_dim = size // heads
        self.q = nn.Parameter(torch.randn(queries, heads, head_dim) * head_dim**-0.5)
        self.k_proj, self.v_proj = nn.Linear(size, size, bias=bias), nn.Linear(size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """``features`` [m, H] → [queries, H]."""
        _, heads, head_dim = self.q.shape
        parts = [part(features).view(-1, heads, head_dim) for part in (self.k_proj, self.v_proj)]  # [m, heads, D]
        query, key, value = (part.transpose(0, 1)[None] for part in (self.q, *parts))  # [1, heads, ., D]
        attended = F.scaled_dot_product_attention(query, key, value)[0]  # [heads, queries, D]
        return self.o_proj(attended.transpose(0, 1).flatten(1))


class ViSpecDraft(TrainedHead):
    """A ViSpec head. A new one ignores the global vector."""

    kind = "ViSpec"
    config: ViSpecConfig
    embed_tokens: nn.Embedding

    def __init__(self, config: ViSpecConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.img_fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        nn.init.eye_(self.img_fc.weight)
        if config.fc_bias:
            nn.init.zeros_(self.img_fc.bias)
        self.imadpt = Compressor(size, config.queries, config.num_attention_heads, config.compressor_bias)
        self.layers = nn.ModuleList([DraftLayer(config, input_norm=config.input_layernorm)])
        self.rotary = self.new_rotary()

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], where: str | Path, shapes: Mapping[str, tuple[int, ...]] | None
    ) -> ViSpecDraft:
        """A head without weights.

        Args:
            config: the published ``config.json``.
            where: named in errors.
            shapes: of the checkpoint's tensors. None if they are not known.

        Raises:
            UserError: a value is missing or wrong.
        """
        own = ViSpecConfig.from_dict(config, where, shapes)
        found = (shapes or {}).get(QUERIES)
        if found:
            if VISPEC in config and own.queries != found[0]:
                raise UserError(f"{QUERIES} has {found[0]} queries, section '{VISPEC}' says {own.queries}", where)
            own = replace(own, queries=found[0])
        return cls(own)

    def new_rotary(self) -> Rotary:
        return Rotary(self.config.head_dim, self.config.rope_theta, None)

    @property
    def positions(self) -> Literal["plain", "temporal", "mrope"]:
        return "plain"

    @property
    def embeds_image_ids(self) -> bool:
        return self.config.image_rows == "token"

    @property
    def image_queries(self) -> int | None:
        return None if self.embeds_image_ids else self.config.queries

    def conventions(self) -> str:
        rows = f"{self.config.queries - 1} for each picture and a global vector"
        images = "token" if self.embeds_image_ids else rows
        return f"hidden states after the final norm; positions plain; image rows: {images}; lm_head: of the target"

    def read_prompt(self, prompt: Prompt, compression: Compression) -> PromptRows:
        context, queries = self.empty_context(), self.image_queries
        if queries is None:
            return PromptRows(self.text_rows(prompt.features, prompt.next_ids, context), context=context)
        plan = query_rows(prompt.next_is_image[0], queries)
        is_image = prompt.next_is_image[:, plan.source]  # [1, R']
        embeds = self.embed_tokens(prompt.next_ids[:, plan.source].masked_fill(is_image, 0))  # [1, R', H]
        features = [prompt.next_embeds[0, start:end].to(self.dtype) for start, end in plan.runs]
        rows = self.next_embeds(embeds, is_image, plan.pictures[None], features)
        x = self.fuse(prompt.features[:, plan.source], rows, is_image)
        return PromptRows(x, plan.places[None], prompt.next_ids.shape[1], rows[:, -1, embeds.shape[-1] :])

    def next_embeds(self, embeds: Tensor, is_image: Tensor, pictures: Tensor, features: Sequence[Tensor]) -> Tensor:
        """What stands for the next tokens: their embedding or their row of a picture, and the global vector behind it,
        [B, R', 2 H].

        Args:
            embeds: [B, R', H] embeddings of the tokens.
            is_image: [B, R'] bool, true for the rows of pictures.
            pictures: [B, R'] number of the last picture up to a row, counted from 1 in all samples; 0 is none.
            features: [m, H] of each picture.
        """
        vectors = self.empty_context()
        if features:
            compressed = torch.stack([self.imadpt(each) for each in features])  # [P, queries, H]
            rows = [every[: len(each)] for every, each in zip(compressed[:, :-1], features, strict=True)]
            embeds = embeds.masked_scatter(is_image.unsqueeze(-1), torch.cat(rows).to(embeds.dtype))
            vectors = torch.cat([vectors, compressed[:, -1].to(vectors.dtype)])
        return torch.cat([embeds, vectors[pictures]], dim=-1)

    def empty_context(self) -> Tensor:
        return torch.zeros(1, self.config.hidden_size, dtype=self.dtype, device=self.device)

    def text_rows(self, hidden: Tensor, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        assert context is not None
        embeds = self.embed_tokens(tokens)
        return self.fuse(hidden, torch.cat([embeds, context.unsqueeze(1).expand_as(hidden)], dim=-1))

    def fuse(self, hidden: Tensor, next_embeds: Tensor, next_is_image: Tensor | None = None) -> Tensor:
        embeds, vectors = next_embeds.chunk(2, dim=-1)
        informed = self.img_fc(torch.cat([hidden, vectors], dim=-1))
        text = self.fc(torch.cat([embeds, informed], dim=-1))
        return text if next_is_image is None else torch.where(next_is_image.unsqueeze(-1), embeds, text)

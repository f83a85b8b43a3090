"""ViSpec's heads (arXiv 2509.15235): an EAGLE head that reads a few learnt rows for each picture.

Row ``t``, with the target's hidden state ``h_t`` after its final norm:

1. Text: ``fc([E(x_{t+1}) ; img_fc([h_t ; g])])``. ``g`` is a global vector of the last picture, zeros before the first.
2. The rows of a picture attend to its features with learnt queries. All of the results but the last enter the layer as
   they are, without ``fc`` and ``h_t``. The last is ``g`` from then on, also for the whole answer.

Pictures without a token between them count as one. Positions are plain and those of the whole prompt: the rows of a
picture have the last ones of its features. There is no final norm, and the target's ``lm_head`` is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle.drafts.compression import Compression, image_runs
from eagle.drafts.config import DraftConfig
from eagle.drafts.head import DraftHead, Prompt, PromptRows
from eagle.drafts.modules import DraftLayer, Rotary
from llava.errors import UserError
from llava.strict import read_strict, strict_dataclass

QUERIES = "imadpt.q"


@strict_dataclass
class ViSpecOptions:
    """The ``"msd"`` section of a ViSpec head's ``config.json``.

    Attributes:
        image_rows: ``compressed`` as described above; ``token`` reads the embeddings of the image ids as text, and no
            global vector, as the published code does for LLaVA-1.5 alone.
    """

    image_rows: Literal["compressed", "token"] = "compressed"


class Compressor(nn.Module):
    """Learnt queries that attend to the features of a picture.

    Args:
        queries: number of queries, heads, and the size of a head.
    """

    def __init__(self, size: int, queries: tuple[int, int, int], bias: bool) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.zeros(queries))
        self.k_proj, self.v_proj = nn.Linear(size, size, bias=bias), nn.Linear(size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """``features`` [m, H] → [queries, H]."""
        _, heads, head_dim = self.q.shape
        parts = [part(features).view(-1, heads, head_dim) for part in (self.k_proj, self.v_proj)]  # [m, heads, D]
        query, key, value = (part.transpose(0, 1)[None] for part in (self.q, *parts))  # [1, heads, ., D]
        attended = F.scaled_dot_product_attention(query, key, value)[0]  # [heads, queries, D]
        return self.o_proj(attended.transpose(0, 1).flatten(1))


class ViSpecDraft(DraftHead):
    """A ViSpec head.

    Args:
        config: the shape of the layer; its own options are not used.
        queries: of the `Compressor`.
        compressor_bias: whether its keys and values have one.
    """

    kind = "ViSpec"
    config: DraftConfig
    embed_tokens: nn.Embedding

    def __init__(
        self, config: DraftConfig, options: ViSpecOptions, queries: tuple[int, int, int], compressor_bias: bool
    ) -> None:
        super().__init__()
        self.config, self.options = config, options
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.img_fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.imadpt = Compressor(size, queries, compressor_bias)
        self.layers = nn.ModuleList([DraftLayer(config, input_norm=config.input_layernorm)])
        self.rotary = self.new_rotary()

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], where: str | Path, shapes: Mapping[str, tuple[int, ...]]
    ) -> ViSpecDraft:
        """A head without weights.

        Args:
            config: the published ``config.json``.
            where: named in errors.
            shapes: of the checkpoint's tensors.

        Raises:
            UserError: a value is missing or wrong.
        """
        options = read_strict(ViSpecOptions, config.get("msd", {}), f"{where}, section 'msd'")
        sizes = DraftConfig.from_dict({key: config[key] for key in config if key != "msd"}, where, shapes)
        queries = shapes.get(QUERIES) or (2, sizes.num_attention_heads, sizes.head_dim)
        if len(queries) != 3 or queries[1] * queries[2] != sizes.hidden_size:
            raise UserError(f"{QUERIES} is {list(queries)} for a hidden size of {sizes.hidden_size}", where)
        return cls(sizes, options, (queries[0], queries[1], queries[2]), "imadpt.k_proj.bias" in shapes)

    def new_rotary(self) -> Rotary:
        return Rotary(self.config.head_dim, self.config.rope_theta, None)

    def conventions(self) -> str:
        rows = f"{len(self.imadpt.q) - 1} for each picture and a global vector"
        images = rows if self.options.image_rows == "compressed" else "token"
        return f"hidden states after the final norm; positions plain; image rows: {images}; lm_head: of the target"

    def read_prompt(self, prompt: Prompt, compression: Compression) -> PromptRows:
        count, last = prompt.next_ids.shape[1], self.embed_tokens(prompt.next_ids[:, -1:])
        context = self.empty_context()
        if self.options.image_rows == "token":
            return PromptRows(self.text_rows(prompt.features, prompt.next_ids, context), context=context)
        embeds = torch.cat([prompt.next_embeds[:, :-1].to(last.dtype), last], dim=1)  # [1, S, H]
        places = torch.arange(count, device=embeds.device)
        rows, positions, done, kept = [], [], 0, len(self.imadpt.q) - 1
        for start, end in [*image_runs(prompt.next_is_image[0]), (count, count)]:
            text = slice(done, start)
            rows.append(self._fuse(prompt.features[:, text], embeds[:, text], context))
            positions.append(places[text])
            if end > start:
                compressed = self.imadpt(embeds[0, start:end])  # [queries, H]
                rows.append(compressed[None, :-1])
                positions.append(torch.arange(end - kept, end, device=embeds.device))
                context = compressed[-1:]
            done = end
        return PromptRows(torch.cat(rows, dim=1), torch.cat(positions)[None], count, context)

    def empty_context(self) -> Tensor:
        return torch.zeros(1, self.config.hidden_size, dtype=self.dtype, device=self.device)

    def text_rows(self, hidden: Tensor, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        assert context is not None
        return self._fuse(hidden, self.embed_tokens(tokens), context)

    def _fuse(self, hidden: Tensor, embeds: Tensor, context: Tensor) -> Tensor:
        """Input rows of text from hidden states and embeddings [B, n, H] and global vectors [B, H]."""
        vectors = context.unsqueeze(1).expand_as(hidden)  # [B, n, H]
        informed = self.img_fc(torch.cat([hidden, vectors], dim=-1))
        return self.fc(torch.cat([embeds, informed], dim=-1))

"""What decoding needs of a draft head, whatever its kind.

Row ``t`` of a head's input pairs the target's features of token ``t`` with token ``t + 1``. From a row the head
predicts a hidden state. The next token is drafted from it, and it takes the place of the features in that token's row.

==========  =====================================================================================
kind        module
==========  =====================================================================================
MSD         `eagle.drafts.msd`
EAGLE-3     `eagle.drafts.eagle3`
ViSpec      `eagle.drafts.vispec`
block       `eagle.drafts.block`
MTP         `eagle.drafts.mtp`
assistant   `eagle.drafts.assistant`, which reads the target's keys and values instead of rows of its own
==========  =====================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from eagle.drafts.compression import Compression, Merging
from eagle.drafts.modules import MLP, Attention, Rotary, capped, top_children
from eagle.kv_cache import KVCache
from eagle.weight_layout import input_major, to_input_major_layout
from llava.errors import UserError


class Prompt(NamedTuple):
    """The prompt of one sequence, shifted: everything that begins with ``next_`` is of the token after a row's own.

    ``features`` [1, S, F] what the head reads of the target; ``next_ids`` [1, S]; ``next_is_image`` [1, S] bool;
    ``next_embeds`` [1, S, H] the target's input embeddings, projected image features in place; ``positions`` [1, S] or
    [3, 1, S] the target's position ids of the rows' own tokens; ``next_position`` [1] that of the first new token.
    """

    features: Tensor
    next_ids: Tensor
    next_is_image: Tensor
    next_embeds: Tensor
    positions: Tensor
    next_position: Tensor

    def merged(self, plan: Merging) -> Prompt:
        """With S' merged rows: embeddings and positions are means, the rest is that of the last row."""
        positions = plan.mean(self.positions.flatten(0, -2).T).T  # [1 or 3, S']
        return Prompt(
            features=plan.pick(self.features, 1),
            next_ids=plan.pick(self.next_ids, 1),
            next_is_image=plan.pick(self.next_is_image, 1),
            next_embeds=plan.mean(self.next_embeds[0])[None].to(self.next_embeds.dtype),
            positions=positions.reshape(*self.positions.shape[:-1], -1),
            next_position=self.next_position,
        )


class PromptRows(NamedTuple):
    """The input rows of a prompt.

    ``x`` [1, R, X]; ``positions`` [1, R] or [3, 1, R], None for 0, 1, 2, ...; ``next_position``: position of the row
    after them, None for R; ``context`` [1, C] what all later rows of the sequence get from its prompt, if anything.
    """

    x: Tensor
    positions: Tensor | None = None
    next_position: int | None = None
    context: Tensor | None = None


class DraftHead(nn.Module, ABC):
    """A draft head. Its state dict has exactly the keys of the published checkpoints of its kind.

    Attributes:
        kind: its name, for messages.
        compilable: it has compiled parts (`eagle.decode.compiled`).
        target_layers: the target's layers whose input streams are the head's features, ascending. Empty: the features
            are the hidden states after the final norm.
        window: rows that a row sees, itself included. None sees all.
        block_size: tokens that one forward drafts behind the newest row.
        draft_vocab: [K] ids of a trimmed vocabulary. None is all of it.
    """

    kind: ClassVar[str]
    compilable: ClassVar[bool] = True
    config: Any
    layers: nn.ModuleList
    rotary: Rotary
    fc: nn.Linear
    embed_tokens: nn.Embedding | None
    lm_head: nn.Linear | None

    def __init__(self) -> None:
        super().__init__()
        self.target_layers: tuple[int, ...] = ()
        self.lm_head = None
        self.window: int | None = None
        self.block_size = 1
        self.draft_vocab: Tensor | None = None
        self._draft_vocab_head: Tensor | None = None  # [K, H] the rows of the target's lm_head of these tokens
        self._cap: float | None = None  # of the target's logits
        self._target_embedding: tuple[nn.Module, ...] = ()  # a tuple, so that it is not a submodule

    @property
    def device(self) -> Any:
        return self.fc.weight.device

    @property
    def dtype(self) -> Any:
        return self.fc.weight.dtype

    @property
    def compression(self) -> Compression | None:
        """Which image rows the head keeps. None if that cannot be chosen."""
        return None

    @abstractmethod
    def new_rotary(self) -> Rotary:
        """The rotary positions of the config."""

    def renew_rotary(self) -> None:
        """Computes what rotary positions need and checkpoints do not have."""
        self.rotary = self.new_rotary()

    @abstractmethod
    def conventions(self) -> str:
        """What the head reads, in words, for `msd doctor`."""

    @abstractmethod
    def read_prompt(self, prompt: Prompt, compression: Compression) -> PromptRows:
        """The input rows of a prompt."""

    @abstractmethod
    def text_rows(self, hidden: Tensor, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Input rows of new tokens: [B, n, X].

        Args:
            hidden: [B, n, H] predicted hidden states, or `condense` of the target's features.
            tokens: [B, n] the token after each of them.
            context: [B, C] of the sequences' prompts (`PromptRows`).
        """

    def empty_context(self) -> Tensor | None:
        """The context [1, C] of a prompt without pictures. None if the head has none."""
        return None

    def condense(self, features: Tensor) -> Tensor:
        """The target's features [B, n, F] in the form of predicted hidden states, [B, n, H]."""
        return features

    def after_layers(self, x: Tensor) -> Tensor:
        """The last layer's output [B, S, H] in the form of predicted hidden states."""
        return x

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
            x: [B, S, X] rows of `read_prompt` or `text_rows`.
            position_ids: [B, S], or [3, B, S] for M-RoPE positions; ignored if ``rope`` is given.
            attention_mask: [B or 1, 1, S, past + S], bool (true = may look) or additive; None is plain causal, which
                after cached rows is allowed for a single row only.
            cache: rows seen before; this call's rows are appended.
            rope: cosines and sines of the rows from `Rotary`, if the caller has them already.
            last_only: caches all rows, but computes only the last one's hidden state, [B, 1, H].
        """
        if rope is None:
            assert position_ids is not None
            rope = self.rotary(position_ids, x.dtype)
        return self._through_layers(x, rope, attention_mask, cache, last_only)

    def _through_layers(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        last_only: bool = False,
        kept: Tensor | None = None,
    ) -> Tensor:
        causal = mask is None and x.shape[1] > 1
        for index, layer in enumerate(self.layers, start=1):
            last = index == len(self.layers)
            x = layer(x, rope, mask, causal, cache, last and last_only, kept if last else None)
        return self.after_layers(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """The token embedding, [...] → [..., H]: the head's own, or the target's."""
        if self.embed_tokens is not None:
            return self.embed_tokens(tokens)
        (table,) = self._target_embedding
        embeds = table(tokens.to(cast(Tensor, table.weight).device))
        return embeds.to(self.device, self.dtype)

    def use_embedding(self, embedding: nn.Module) -> None:
        """Takes the target's token embedding, for a head without its own."""
        self._target_embedding = (embedding,)

    def prepare_for_decoding(self, head: nn.Module | None = None, cap: float | None = None) -> Self:
        """Fuses the projections that read the same input, changes the memory layout of the weights
        (`eagle.weight_layout`), and copies the rows of the target's ``lm_head`` that a trimmed vocabulary needs. Call
        it once, after loading. Training does not need it. ``cap``: of the target's logits."""
        self._cap = cap
        if self.draft_vocab is not None and head is not None:
            self.draft_vocab = self.draft_vocab.to(self.device)
            if self.lm_head is None:
                weight = cast(Tensor, head.weight)
                if weight.ndim != 2 or not weight.is_floating_point():
                    fix = "load a base whose lm_head is not quantized, or a draft without head_tokens"
                    raise UserError("the draft copies rows of the base's lm_head, which is packed", fix=fix)
                rows = weight[self.draft_vocab.to(weight.device)]  # [K, H]
                self._draft_vocab_head = input_major(rows.to(self.device, self.dtype))
        to_input_major_layout(self)
        for module in self.layers.modules():
            if isinstance(module, Attention | MLP):
                module.fuse()
        return self.eval().requires_grad_(False)

    def vocabulary(self, of_target: int) -> int:
        """The number of tokens that it can draft."""
        own = None if self.lm_head is None else self.lm_head.out_features
        return len(self.draft_vocab) if self.draft_vocab is not None else own or of_target

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the ``lm_head`` reads of predicted hidden states [..., H]."""
        return hidden

    def likely_next(self, hidden: Tensor, top_k: int, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The ``top_k`` most probable next tokens.

        Args:
            hidden: [..., H] predicted hidden states.
            head: the target's ``lm_head``, which a draft without its own uses. A draft with a trimmed vocabulary uses
                its copy of the head's rows instead, and its probabilities are normalised over these tokens.

        Returns:
            Ids and log-probabilities, [..., k] each, on the device of ``hidden``.
        """
        rows = self.head_input(hidden)
        if self.lm_head is not None:
            logits, trimmed = F.linear(rows, self.lm_head.weight), self.draft_vocab
        elif self._draft_vocab_head is not None:
            logits, trimmed = F.linear(rows, self._draft_vocab_head), self.draft_vocab
            logits = logits if self._cap is None else capped(logits, self._cap)
        else:
            logits, trimmed = head(rows), None
        ids, logprobs = top_children(logits, top_k)
        if trimmed is not None:
            ids = trimmed.to(ids.device)[ids]
        return ids.to(hidden.device), logprobs.to(hidden.device)


class TrainedHead(DraftHead):
    """A head that can be trained (`eagle.train`)."""

    @property
    @abstractmethod
    def positions(self) -> Literal["plain", "temporal", "mrope"]:
        """Which position ids its rows have (`eagle.drafts.eagle3_config.Eagle3Options`)."""

    @property
    @abstractmethod
    def embeds_image_ids(self) -> bool:
        """Whether image rows read the embedding of the image token's id, not the projected image feature."""

    @property
    def image_queries(self) -> int | None:
        """The learnt queries of a head whose image rows are their results (`eagle.drafts.compression.query_rows`)."""
        return None

    @abstractmethod
    def fuse(self, hidden: Tensor, next_embeds: Tensor, next_is_image: Tensor | None = None) -> Tensor:
        """Input rows of the layers, [B, S, X].

        Args:
            hidden: [B, S, H] predicted hidden states, or `condense` of the target's features.
            next_embeds: [B, S, H] what stands for the next token; for a ViSpec head [B, S, 2 H], with the global
                vector of the last picture.
            next_is_image: [B, S] bool; None if no row is an image row.
        """

    def forward_rows(
        self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None, kept: Tensor
    ) -> Tensor:
        """As `forward` on an empty cache: caches all rows of ``x``, but computes only the hidden states of the rows
        ``kept`` [B, R], [B, R, H]."""
        rope = self.rotary(position_ids, x.dtype)
        return self._through_layers(x, rope, attention_mask, cache, kept=kept)

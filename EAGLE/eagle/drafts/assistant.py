"""Gemma 4's assistants: small models that read the keys and values of the target (``gemma4_assistant``).

An assistant caches nothing. Each of its layers attends to the accepted rows of the target's last layer of the same type
that has keys and values of its own. All tokens of a draft are drafted from the position of the newest token ``x``:

1. ``y = pre_projection([E(x) ; h])``, with ``h`` the target's hidden state, after its final norm, that chose ``x``;
2. ``z = norm(layers(y))``, with layers of the target's own kind;
3. logits: the assistant's own ``lm_head`` of ``z``. With ordered embeddings only the tokens of the best centroids have
   logits;
4. for the next level, the drafted token takes the place of ``x``, and ``post_projection(z)`` that of ``h``.

So nodes of a draft tree do not see each other. The token embedding ``E`` is the target's; the layers are the classes of
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import Self

from eagle.drafts.compression import Compression
from eagle.drafts.config import check_objects
from eagle.drafts.head import DraftHead, Prompt, PromptRows
from eagle.drafts.modules import Rotary, capped, top_children
from eagle.kv_cache import KVCache
from eagle.weight_layout import to_input_major_layout
from llava.errors import UserError
from llava.strict import read_strict, strict_dataclass

MODELS = ("gemma4_assistant", "gemma4_unified_assistant")
SLIDING = "sliding_attention"
EMBEDDING, LM_HEAD, ORDERING = "model.embed_tokens.weight", "lm_head.weight", "masked_embedding.token_ordering"


@strict_dataclass
class AssistantOptions:
    """The ``"msd"`` section of the ``config.json``. The defaults are what transformers does, the others vLLM.

    Attributes:
        position: of the queries: ``next``, that of the newest token, or ``last``, that of the last cached row.
        window: rows that a sliding layer sees: ``inclusive`` one more than the config's ``sliding_window``, or
            ``exclusive`` so many.
        logit_cap: ``none``, or ``config`` to apply ``final_logit_softcapping``. It changes no token of a chain.
    """

    position: Literal["next", "last"] = "next"
    window: Literal["inclusive", "exclusive"] = "inclusive"
    logit_cap: Literal["none", "config"] = "none"


class AssistantDraft(DraftHead):
    """An assistant.

    Predicted hidden states are ``[z ; post_projection(z)]``: the part for the logits [..., D], and the part that takes
    the place of the target's hidden state [..., H].

    Args:
        assistant: config of the whole assistant.

    Attributes:
        sources: the target's layer that each type of layer reads.
    """

    kind = "Gemma 4 assistant"
    compilable = False
    embed_tokens: None
    lm_head: nn.Linear

    def __init__(self, assistant: Any, options: AssistantOptions) -> None:
        super().__init__()
        self.assistant, self.options, self.config = assistant, options, assistant.get_text_config()
        stock = AutoModelForCausalLM.from_config(assistant, attn_implementation="sdpa")
        self.model, self.lm_head, self.embed_tokens = stock.model, stock.lm_head, None
        del self.model.embed_tokens  # another name of the lm_head
        self.pre_projection, self.post_projection = stock.pre_projection, stock.post_projection
        self.masked_embedding = stock.masked_embedding
        self.sources: dict[str, int] = {}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str | Path) -> Self:
        """An assistant without weights.

        Args:
            config: the published ``config.json``.
            where: named in errors.

        Raises:
            UserError: a value is missing or wrong.
        """
        options = read_strict(AssistantOptions, config.get("msd", {}), f"{where}, section 'msd'")
        check_objects(config, ("text_config",), where)
        if not config.get("text_config"):
            raise UserError("lacks text_config", where, "is this the config.json of an assistant?")
        known = {name: value for name, value in config.items() if name not in ("msd", "model_type")}
        assistant = AutoConfig.for_model(config["model_type"], **known)
        text, clusters = assistant.get_text_config(), assistant.num_centroids
        if assistant.use_ordered_embeddings and text.vocab_size % clusters:
            raise UserError(f"num_centroids={clusters}", where, f"must divide the vocabulary of {text.vocab_size}")
        if assistant.use_ordered_embeddings and not 1 <= assistant.centroid_intermediate_top_k <= clusters:
            best = assistant.centroid_intermediate_top_k
            raise UserError(f"centroid_intermediate_top_k={best}", where, f"give a number from 1 to {clusters}")
        if options.logit_cap == "config" and text.final_logit_softcapping is None:
            fix = "leave out logit_cap, or add final_logit_softcapping to text_config"
            raise UserError("logit_cap 'config', but the config has none", where, fix)
        return cls(assistant, options)

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        return self.model.layers

    @property
    def fc(self) -> nn.Linear:  # type: ignore[override]
        return self.pre_projection

    @property
    def seen(self) -> int:
        """Cached rows that a sliding layer sees."""
        return self.config.sliding_window + (self.options.window == "inclusive")

    def new_rotary(self) -> Rotary:
        return type(self.model.rotary_emb)(self.config).to(self.device)

    def renew_rotary(self) -> None:
        self.model.rotary_emb = self.new_rotary()

    def _apply(self, *arguments: Any, **more: Any) -> Self:
        super()._apply(*arguments, **more)
        self.renew_rotary()  # a conversion to 16 bit must not coarsen the angles
        return self

    def conventions(self) -> str:
        options, ordered = self.options, self.masked_embedding is not None
        chosen = (
            f" of the best {self.assistant.centroid_intermediate_top_k} of {self.assistant.num_centroids} centroids"
        )
        return (
            "hidden state after the final norm; keys and values of the base's last own layer of each type, accepted "
            f"rows only; position of all drafted tokens: {options.position}; window: {options.window} ({self.seen} "
            f"rows); logit cap: {options.logit_cap}; output fed back after post_projection; embedding: of the base, "
            f"lm_head: own{chosen if ordered else ''}"
        )

    def with_head(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a checkpoint, with the embedding as ``lm_head`` if the two are tied and it has the first alone."""
        if LM_HEAD in tensors or EMBEDDING not in tensors or not self.assistant.tie_word_embeddings:
            return tensors
        return {LM_HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}

    def check_ordering(self, where: str | Path) -> None:
        """Raises `UserError` if ordered embeddings do not have each token once. ``where``: the file."""
        if self.masked_embedding is None or self.device.type == "meta":
            return
        ids = self.masked_embedding.token_ordering
        if ids.is_floating_point() or not torch.equal(ids.long().sort().values, torch.arange(len(ids))):
            raise UserError(f"{ORDERING} does not have each token once", where, "use another checkpoint")
        self.masked_embedding.token_ordering = ids.long()

    def prepare_for_decoding(self, head: nn.Module | None = None, cap: float | None = None) -> Self:
        """Its logits are its own, so ``head`` and ``cap`` of the target are not used."""
        looked_up = [] if self.masked_embedding is None else [self.lm_head.weight]
        to_input_major_layout(self, skip=looked_up)
        return self.eval().requires_grad_(False)

    def condense(self, features: Tensor) -> Tensor:
        return F.pad(features, (self.config.hidden_size, 0))

    def read_prompt(self, prompt: Prompt, compression: Compression) -> PromptRows:
        """The last row alone: of the others the target's keys and values are read."""
        return PromptRows(self.text_rows(self.condense(prompt.features[:, -1:]), prompt.next_ids[:, -1:]))

    def text_rows(self, hidden: Tensor, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cat([self.embed(tokens), hidden[..., self.config.hidden_size :]], dim=-1)

    def row_positions(self, lengths: Tensor) -> Tensor:
        """Positions of the rows after ``lengths`` [...] cached ones."""
        return lengths if self.options.position == "next" else lengths - 1

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Predicted hidden states [B, S, D + H] of rows that see all accepted rows and not each other.

        Args:
            x: [B, S, 2 H].
            position_ids: [B, S].
            cache: the target's, with accepted rows alone. It is not changed.
            attention_mask, rope, last_only: not used.
        """
        assert cache is not None and position_ids is not None
        lengths = torch.tensor(cache.lengths, device=x.device).unsqueeze(1)  # [B, 1]
        states: dict[str, tuple[Tensor, ...]] = {}
        masks: dict[str, Tensor] = {}
        for kind, index in self.sources.items():
            seen = self.seen if kind == SLIDING else cache.length
            first = max(0, min(cache.lengths) - seen)
            layer = cache.layers[index]
            states[kind] = tuple(part[:, :, first : cache.length].to(x) for part in (layer.store_k, layer.store_v))
            places = torch.arange(first, cache.length, device=x.device)
            hidden = (places >= lengths) | (places < lengths - seen)  # [B, T]
            mask = x.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(x.dtype).min)
            masks[kind] = mask[:, None, None].expand(-1, -1, x.shape[1], -1)  # [B, 1, S, T]
        output = self.model(
            inputs_embeds=self.pre_projection(x),
            position_ids=position_ids,
            attention_mask=masks,
            shared_kv_states=states,
            use_cache=False,
            logits_to_keep=torch.arange(x.shape[1], device=x.device),  # all; the default, 0, needs inputs by layer
        ).last_hidden_state  # [B, S, D]
        return torch.cat([output, self.post_projection(output)], dim=-1)

    def head_input(self, hidden: Tensor) -> Tensor:
        return hidden[..., : self.config.hidden_size]

    def likely_next(self, hidden: Tensor, top_k: int, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """As for `DraftHead`, from its own logits. With ordered embeddings the probabilities are normalised over the
        tokens that have logits."""
        rows, weight, ordered = self.head_input(hidden), self.lm_head.weight, self.masked_embedding
        if ordered is None:
            logits = F.linear(rows, weight)
            cap = self.config.final_logit_softcapping if self.options.logit_cap == "config" else None
            return top_children(logits if cap is None else capped(logits, cap), top_k)
        best = ordered.centroids(rows).topk(self.assistant.centroid_intermediate_top_k).indices  # [..., C]
        tokens = ordered.token_ordering.view(self.assistant.num_centroids, -1)[best].flatten(-2)  # [..., n]
        places, logprobs = top_children((weight[tokens] @ rows.unsqueeze(-1)).squeeze(-1), top_k)
        return tokens.gather(-1, places), logprobs

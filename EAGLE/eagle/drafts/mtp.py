"""The MTP layer that Qwen3.5 checkpoints have beside the model itself (tensors ``mtp.*``).

Row ``t``, with the target's hidden state ``h_t`` after its final norm:

1. ``x = fc([pre_fc_norm_embedding(E(x_{t+1})) ; pre_fc_norm_hidden(h_t)])``; in image rows the projected image feature
   takes the place of the embedding;
2. ``z = norm(layer(x))``, with one layer of the target's own kind with full attention;
3. logits: the target's ``lm_head`` of ``z``;
4. ``z`` takes the place of ``h_t`` in the row of the drafted token.

Embedding and ``lm_head`` are the target's. The layer is the class of transformers. The head is read from the base's own
checkpoint, or from a folder with its ``config.json`` and these tensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from eagle.drafts.compression import Compression
from eagle.drafts.config import check_keys, check_objects
from eagle.drafts.head import DraftHead, Prompt, PromptRows
from eagle.drafts.modules import Rotary
from eagle.kv_cache import KVCache
from llava.errors import UserError
from llava.strict import read_strict, strict_dataclass

PREFIX = "mtp."
"""Of the tensors, in a base's checkpoint."""
MARKS = ("pre_fc_norm_hidden.weight", "pre_fc_norm_embedding.weight")
"""Tensors that only heads of this kind have."""
TEXT_MODELS = ("qwen3_5_text", "qwen3_5_moe_text")
FULL = "full_attention"
_EXPERT = re.compile(r"(layers\.0\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@strict_dataclass
class MTPOptions:
    """The ``"msd"`` section of the ``config.json``.

    Attributes:
        positions: ``mrope`` the target's three rows, as in vLLM's first model runner; ``plain`` 0, 1, 2, ..., as in its
            second. They differ only in prompts with pictures.
    """

    positions: Literal["mrope", "plain"] = "mrope"


class MTPDraft(DraftHead):
    """An MTP layer.

    Args:
        base: config of the target's text model.
    """

    kind = "MTP"
    embed_tokens: None

    def __init__(self, base: Any, options: MTPOptions) -> None:
        super().__init__()
        self.base, self.options = base, options
        self.config = config = deepcopy(base)
        config.num_hidden_layers, config.layer_types, config._attn_implementation = 1, [FULL], "sdpa"
        layer, norm = layer_classes(config.model_type)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = None
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm(size, eps=eps), norm(size, eps=eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([layer(config, 0)])
        self.norm = norm(size, eps=eps)
        self.rotary = self.new_rotary()
        known = signature(layer.forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"  # of older releases

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str | Path) -> MTPDraft:
        """A head without weights.

        Args:
            config: the base's ``config.json``, or that of its text model.
            where: named in errors.

        Raises:
            UserError: a value is missing or wrong, or it is not a Qwen3.5 with one MTP layer.
        """
        options = read_strict(MTPOptions, config.get("msd", {}), f"{where}, section 'msd'")
        check_objects(config, ("text_config",), where)
        check_keys(config, ("msd", "text_config"), where, MTPOptions)
        text = dict(config.get("text_config") or config)
        kind = text.pop("model_type", None) or f"{config.get('model_type')}_text"
        if kind not in TEXT_MODELS:
            raise UserError(f"MTP layers of '{kind}' are not supported", where, "only those of Qwen3.5 are")
        count = text.pop("mtp_num_hidden_layers", 1)
        if count != 1:
            raise UserError(f"mtp_num_hidden_layers={count!r}", where, "only heads of one layer are supported")
        base = AutoConfig.for_model(kind, **text)
        rope = base.rope_parameters.get("rope_type")
        if rope != "default":
            raise UserError(f"rotary positions of type {rope!r} in the head", where, "only default ones are supported")
        return cls(base, options)

    def new_rotary(self) -> Rotary:
        config, rope = self.config, self.config.rope_parameters
        size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        return Rotary(size, rope["rope_theta"], tuple(rope.get("mrope_section") or (size // 2,)), interleaved=True)

    def conventions(self) -> str:
        return (
            f"hidden states after the final norm; positions {self.options.positions}; image rows: feature; "
            "output fed back after the final norm; embedding and lm_head: of the target"
        )

    def read_prompt(self, prompt: Prompt, compression: Compression) -> PromptRows:
        last = self.embed(prompt.next_ids[:, -1:])  # [1, 1, H]
        x = self._fuse(prompt.features, torch.cat([prompt.next_embeds[:, :-1].to(last.dtype), last], dim=1))
        if self.options.positions == "plain":
            return PromptRows(x)
        return PromptRows(x, prompt.positions, int(prompt.next_position))

    def text_rows(self, hidden: Tensor, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        return self._fuse(hidden, self.embed(tokens))

    def _fuse(self, hidden: Tensor, embeds: Tensor) -> Tensor:
        """Input rows of the layer from hidden states and embeddings [B, n, H]."""
        return self.fc(torch.cat([self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden)], dim=-1))

    def after_layers(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        if rope is None:
            assert position_ids is not None
            rope = self.rotary(position_ids, x.dtype)
        (layer,) = self.layers
        angles = tuple(part.squeeze(1) for part in rope)  # [1 or B, 1 or S, D]
        x = layer(x, position_embeddings=angles, attention_mask=attention_mask, **{self._cache_argument: cache})
        return self.after_layers(x[:, -1:] if last_only else x)


def layer_classes(kind: str) -> tuple[Any, Any]:
    """The classes of a layer and of its norms in a text model. Older releases of transformers do not have them."""
    if kind == "qwen3_5_moe_text":
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as experts

        return experts.Qwen3_5MoeDecoderLayer, experts.Qwen3_5MoeRMSNorm
    from transformers.models.qwen3_5 import modeling_qwen3_5 as dense

    return dense.Qwen3_5DecoderLayer, dense.Qwen3_5RMSNorm


def stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one expert each (Qwen3.5) as those of all experts (Qwen3.6, transformers): ``gate_up_proj``
    [E, 2 I, H] and ``down_proj`` [E, H, I]. Unchanged if they are not complete."""
    parts: dict[str, dict[int, Tensor]] = {"gate": {}, "up": {}, "down": {}}
    found = {name: match for name in tensors if (match := _EXPERT.fullmatch(name))}
    for name, match in found.items():
        parts[match[3]][int(match[2])] = tensors[name]
    gate, up, down = ([part[index] for index in sorted(part)] for part in parts.values())
    complete = all(part.keys() == set(range(len(down))) for part in parts.values())
    if not found or not complete or any(len({part.shape for part in group}) > 1 for group in (gate, up, down)):
        return tensors
    prefix = next(iter(found.values()))[1]
    stacked = {
        f"{prefix}.gate_up_proj": torch.cat([torch.stack(gate), torch.stack(up)], dim=1),
        f"{prefix}.down_proj": torch.stack(down),
    }
    return {name: tensor for name, tensor in tensors.items() if name not in found} | stacked

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
``fc([image feature ; h_t])`` in image rows too: what the paper compares with. One whose layer has another hidden size
than the target (``"layer_size"``) reads image features through ``image_fc``, and predicts ``h`` through ``out_fc``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from eagle.drafts.compression import Compression
from eagle.drafts.config import DraftConfig
from eagle.drafts.head import Prompt, PromptRows, TrainedHead
from eagle.drafts.modules import DraftLayer, Rotary


class DraftModel(TrainedHead):
    """MSD's draft head."""

    kind = "MSD"
    config: DraftConfig
    embed_tokens: nn.Embedding

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        size, inner = config.hidden_size, config.layer_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.fc = nn.Linear(2 * size, inner, bias=config.fc_bias)
        own_size = config.options.layer_size is not None
        self.image_fc = nn.Linear(size, inner, bias=False) if own_size else None
        self.out_fc = nn.Linear(inner, size, bias=False) if own_size else None
        sizes = replace(config, hidden_size=inner)
        self.layers = nn.ModuleList([DraftLayer(sizes, input_norm=config.input_layernorm)])
        self.rotary = self.new_rotary()
        self.spare_head: Tensor | None = None  # [V, H] an lm_head in the checkpoint, to be compared with the base's

    def new_rotary(self) -> Rotary:
        config = self.config
        return Rotary(config.head_dim, config.rope_theta, config.mrope_section, config.mrope_interleaved)

    @property
    def compression(self) -> Compression:
        return self.config.options.compression

    @property
    def positions(self) -> Literal["plain", "temporal", "mrope"]:
        return self.config.options.positions

    @property
    def embeds_image_ids(self) -> bool:
        return False

    def conventions(self) -> str:
        options = self.config.options
        kept = "all" if options.image_tokens is None else f"at most {options.image_tokens}"
        rows = "features without fc" if options.decoupled else "features through fc"
        return f"hidden states after the final norm; positions {options.positions}; image rows: {kept}, {rows}"

    def fuse(self, hidden: Tensor, next_embeds: Tensor, next_is_image: Tensor | None = None) -> Tensor:
        """Input rows of the layer [B, S, layer size], as in the table above.

        Args:
            hidden: [B, S, H] target (or predicted) hidden state ``h_t``.
            next_embeds: [B, S, H] ``E(x_{t+1})``, or the projected image feature where ``x_{t+1}`` is an image token.
            next_is_image: [B, S] bool; None if no row is an image row.
        """
        text = self.fc(torch.cat([next_embeds, hidden], dim=-1))
        if next_is_image is None or not self.config.options.decoupled:
            return text
        image = next_embeds if self.image_fc is None else self.image_fc(next_embeds)
        return torch.where(next_is_image.unsqueeze(-1), image, text)

    def read_prompt(self, prompt: Prompt, compression: Compression) -> PromptRows:
        plan = compression.plan(prompt.next_is_image[0])
        hidden, next_ids, next_is_image, features, positions, next_position = (
            prompt if plan is None else prompt.merged(plan)
        )
        embeds = torch.where(next_is_image.unsqueeze(-1), features, self.embed_tokens(next_ids))
        x = self.fuse(hidden, embeds, next_is_image)
        if self.config.options.positions == "plain":
            return PromptRows(x)
        return PromptRows(x, positions, int(next_position))

    def text_rows(self, hidden: Tensor, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        return self.fuse(hidden, self.embed_tokens(tokens))

    def after_layers(self, x: Tensor) -> Tensor:
        return x if self.out_fc is None else self.out_fc(x)

"""Qwen3.5 as target: three of four layers are linear attention, with a state instead of cached rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

from eagle.families.base import PromptEmbeds
from eagle.families.layers import FULL, LINEAR
from eagle.families.qwen2_vl.target import Qwen2VLTarget
from eagle.recurrent_state import StateLayer, note_inputs


class Qwen3_5Target(Qwen2VLTarget):
    """Qwen3.5 with dense layers."""

    family = "qwen3_5"
    model_class = Qwen3_5ForConditionalGeneration
    text_types = ("qwen3_5_text",)

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        super().__init__(model, processor)
        for index in self.layers.linear:
            self.text_model.layers[index].linear_attn.register_forward_pre_hook(note_inputs, with_kwargs=True)

    def new_states(self, batch: int) -> dict[int, Any]:
        return {index: StateLayer.empty(batch) for index in self.layers.linear}

    def read_prompt(self, prompt: PromptEmbeds, positions: Tensor, **arguments: Any) -> Tensor:
        if arguments.get("attention_mask") is None:  # no padding: plain causal
            arguments["attention_mask"] = {FULL: None, LINEAR: None}
        return super().read_prompt(prompt, positions, **arguments)


class Qwen3_5MoeTarget(Qwen3_5Target):
    """Qwen3.5 with experts."""

    family = "qwen3_5_moe"
    model_class = Qwen3_5MoeForConditionalGeneration
    text_types = ("qwen3_5_moe_text",)

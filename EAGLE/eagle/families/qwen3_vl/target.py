"""Qwen3-VL as target: pictures also enter the first text layers (DeepStack), and videos are frames with timestamps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from eagle.families.base import PromptEmbeds, encode_media, joined_features
from eagle.families.qwen2_vl.target import Qwen2VLTarget


class Qwen3VLTarget(Qwen2VLTarget):
    """Qwen3-VL with dense layers."""

    family = "qwen3_vl"
    model_class = Qwen3VLForConditionalGeneration
    text_types = ("qwen3_vl_text",)

    def embed_prompt(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> PromptEmbeds:
        encoded = {
            media.name: encode_media(
                self.model, inputs, media.name, **{name: inputs.get(name) for name in media.inputs}
            )
            for media in self.media
        }
        given = {**inputs, "mm_encoder_outputs": encoded}
        prompt = super().embed_prompt(input_ids, given)
        masks = [self.media_mask(media, input_ids, inputs)[prompt.image_mask] for media in self.media]  # [I] each
        found = [(mask, encoded[media.name]) for media, mask in zip(self.media, masks, strict=True)]
        layers = [len(output.deepstack_features) for _, output in found if output is not None]
        return prompt._replace(deepstack=tuple(joined_layer(found, layer) for layer in range(max(layers, default=0))))

    def read_prompt(self, prompt: PromptEmbeds, positions: Tensor, **arguments: Any) -> Tensor:
        if prompt.deepstack and bool(prompt.image_mask.any()):
            arguments |= {"visual_pos_masks": prompt.image_mask, "deepstack_visual_embeds": list(prompt.deepstack)}
        return super().read_prompt(prompt, positions, **arguments)


class Qwen3VLMoeTarget(Qwen3VLTarget):
    """Qwen3-VL with experts."""

    family = "qwen3_vl_moe"
    model_class = Qwen3VLMoeForConditionalGeneration
    text_types = ("qwen3_vl_moe_text",)


def joined_layer(encoded: list[tuple[Tensor, Any]], layer: int) -> Tensor:
    """What one text layer adds at the places of media, [I, H] in prompt order.

    Args:
        encoded: for each kind of media which of the places [I] are its own, and transformers' output.
    """
    parts = [
        (mask, joined_features(output.deepstack_features[layer])) for mask, output in encoded if output is not None
    ]
    first = parts[0][1]
    joined = first.new_zeros(encoded[0][0].shape[0], first.shape[-1])
    for mask, features in parts:
        joined[mask] = features
    return joined

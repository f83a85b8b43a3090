"""Gemma 4 as target: each text layer reads the tokens itself, layers share keys and values, and logits are capped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4ForConditionalGeneration, PreTrainedModel

from eagle.families.base import Media, PromptEmbeds
from eagle.families.stock import StockTarget
from llava.errors import UserError


class Gemma4Target(StockTarget):
    """Gemma 4 of any size, with experts or without."""

    family = "gemma4"
    model_class = Gemma4ForConditionalGeneration
    text_types = ("gemma4_text",)
    caps_logits = True
    media = (
        Media("image", "image_token_id", ("pixel_values", "image_position_ids")),
        Media("video", "video_token_id", ("pixel_values_videos", "video_position_ids", "num_frames_per_video")),
    )

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        super().__init__(model, processor)
        config = self.config
        self.media_ids = (config.image_token_id, config.video_token_id, config.audio_token_id)

    @property
    def reads_tokens_by_layer(self) -> bool:
        """Whether each text layer has an embedding of its own."""
        return bool(getattr(self.config.get_text_config(), "hidden_size_per_layer_input", None))

    def read_ids(self, ids: Tensor) -> Tensor:
        """Ids of media are read as padding."""
        is_media = torch.stack([ids == index for index in self.media_ids]).any(dim=0)
        return ids.masked_fill(is_media, self.config.get_text_config().pad_token_id)

    def token_reader(self) -> Callable[[Tensor], dict[str, Tensor]]:
        text, read_ids, plain = self.text_model, self.read_ids, super().token_reader()
        if not self.reads_tokens_by_layer:
            return lambda tokens: plain(read_ids(tokens))

        def read(tokens: Tensor) -> dict[str, Tensor]:
            ids = read_ids(tokens)
            return plain(ids) | {"per_layer_inputs": text.get_per_layer_inputs(ids)}

        return read

    def embed_prompt(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> PromptEmbeds:
        if inputs.get("input_features") is not None or bool((input_ids == self.config.audio_token_id).any()):
            raise UserError("audio in the prompt is not supported", fix="leave it out")
        prompt = super().embed_prompt(input_ids, inputs)
        if not self.reads_tokens_by_layer:
            return prompt
        return prompt._replace(per_layer=self.text_model.get_per_layer_inputs(self.read_ids(input_ids)))

    def read_prompt(self, prompt: PromptEmbeds, positions: Tensor, **arguments: Any) -> Tensor:
        """The masks are those of the stock model's own forward over such a prompt."""
        cache = self.cache_argument
        arguments["attention_mask"] = self.prompt_masks(
            prompt.image_mask,
            inputs_embeds=prompt.embeds,
            attention_mask=arguments.get("attention_mask"),
            position_ids=positions,
            **{cache: arguments.get(cache)},
        )
        return super().read_prompt(prompt, positions, per_layer_inputs=prompt.per_layer, **arguments)

    def prompt_masks(self, is_media: Tensor, **arguments: Any) -> dict[str, Tensor | None]:
        """A mask for each type of layer. ``is_media`` [B, S] bool."""
        return self.model.create_masks_for_generate(
            config=self.config, mm_token_type_ids=is_media.long(), is_first_iteration=True, **arguments
        )

    def complete_inputs(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Token types, without which transformers reads the tokens of a picture as text."""
        if inputs.get("mm_token_type_ids") is not None:
            return {}
        masks = [self.media_mask(media, input_ids, inputs) for media in self.media]
        return {"mm_token_type_ids": sum(mask * kind for kind, mask in enumerate(masks, start=1))}

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """Layers that use the rows of an earlier one have none."""
        text = self.config.get_text_config()
        layers = (text.per_layer_config[index] for index in range(text.num_hidden_layers))
        return [
            (0 if sharing == "reuse" else layer.num_key_value_heads, layer.head_dim)
            for layer, sharing in zip(layers, text.kv_sharing_modes, strict=True)
        ]

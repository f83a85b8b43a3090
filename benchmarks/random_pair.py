"""A LLaVA of any shape and a draft that fits it, with random weights, made in memory: for costs, not for answers.

Weights repeat one block of random numbers, since drawing billions of them takes minutes and changes no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import Target
from eagle.families.llava.target import LlavaTarget
from llava.strict import strict_dataclass

BLOCK, SPREAD = 65_521, 0.02
SPECIAL = 3  # ids below it begin, end or fill up
PATCH = 14


@strict_dataclass
class Shape:
    """Sizes of the text model (and draft), counts of elements; ``positions``: the longest prompt with its answer;
    ``tower``: layers and width of the vision tower, ``side``: pixels of a picture's edge."""

    hidden: int = 256
    layers: int = 16
    heads: int = 4
    intermediate: int = 640
    vocabulary: int = 2048
    positions: int = 16_384
    tower: tuple[int, int] = (2, 32)
    side: int = 28

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        """Of ``lm_head``; the token embedding has as many."""
        return self.vocabulary * self.hidden

    @property
    def draft_parameters(self) -> int:
        """That one draft step reads, without the head."""
        return self.layer_parameters + 2 * self.hidden**2


@dataclass(frozen=True)
class RandomPrompt:
    """``batch`` prompts of ``length`` random ids; work as in `eagle.benchmark.Work`."""

    length: int
    batch: int = 1
    seed: int = 0

    def inputs(self, target: Target) -> dict[str, Any]:
        """ids [B, S] without a picture: in the text model its positions cost what others do."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(SPECIAL, target.vocab_size - 1, (self.batch, self.length), generator=generator)
        return {"input_ids": ids.to(target.device), "attention_mask": torch.ones_like(ids).to(target.device)}


def random_target(shape: Shape, dtype: torch.dtype, device: torch.device) -> Target:
    """The target alone."""
    layers, width = shape.tower
    text = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads, intermediate_size=shape.intermediate, vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), image_size=shape.side, patch_size=PATCH,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=shape.vocabulary - 1, tie_word_embeddings=False
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.to(dtype).to_empty(device=device)
    fill(model)
    language = model.model.language_model
    language.rotary_emb = type(language.rotary_emb)(config=text).to(device)
    for name, places in list(model.named_buffers()):
        if name.endswith("position_ids"):
            places.copy_(torch.arange(places.shape[-1], device=device).expand_as(places))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return LlavaTarget(model, processor=None)


def random_draft(shape: Shape, dtype: torch.dtype, device: torch.device) -> DraftModel:
    """A draft of the published LLaVA layout."""
    config = DraftConfig(
        model_type="llava", hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=shape.vocabulary,
        head_dim=shape.hidden // shape.heads,
    )  # fmt: skip
    with torch.device("meta"):
        draft = DraftModel(config)
    draft.to(dtype).to_empty(device=device)
    draft.rotary = type(draft.rotary)(config.head_dim, config.rope_theta, None).to(device)
    fill(draft)
    return draft


def random_pair(shape: Shape, dtype: torch.dtype, device: torch.device, tree: TreeConfig | None = None) -> MSDModel:
    """Target and draft together, not compiled."""
    return MSDModel(random_target(shape, dtype, device), random_draft(shape, dtype, device), tree, compile=False)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, ones for norms."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        block = SPREAD * torch.randn(BLOCK, generator=torch.Generator().manual_seed(parameter.numel() % BLOCK))
        tile(parameter.view(-1), block.to(parameter.device, parameter.dtype))


def tile(flat: Tensor, block: Tensor) -> None:
    """Repeats ``block`` [K] over ``flat`` [N], in place."""
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block.expand(whole // block.numel(), -1))
    flat[whole:].copy_(block[: flat.numel() - whole])

"""Tiny LLaVA-1.5 checkpoints with random weights, made by the true constructors, in both public layouts.

    make_liuhaotian(folder, tower="separate")   LlavaLlamaForCausalLM shards, CLIP tower beside or inside them
    make_llava_hf(folder)                       safetensors of LlavaForConditionalGeneration

The same seed and sizes give the same weights in both layouts (the llava-hf one has extra rows in the vocabulary for
`<image>` and `<pad>`). A picture has (image_size / patch_size)^2 tokens, 16 by default. The rows of the special ids in
`lm_head` are zero, so that an end token is not produced early. No pytest in here: any package's tests may import it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_tokenizer import tokenizer_size, write_json, write_tokenizer_json, write_tokenizer_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

TOWER_FOLDER = "tiny-clip"


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a model. The vocabulary is that of the tokenizer (liuhaotian; a larger one has rows without a token) or
    a little more (llava-hf); ``spread`` is the deviation of random weights."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 64
    max_positions: int = 512
    vision_hidden: int = 24
    vision_layers: int = 3
    vision_heads: int = 2
    image_size: int = 56
    patch_size: int = 14
    vocabulary: int | None = None
    spread: float = 0.25

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def make_liuhaotian(
    folder: str | Path,
    *,
    tower: Literal["separate", "inside"] = "separate",
    sizes: TinySizes | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 2,
    safetensors: bool = False,
    model_type: str = "llava",
    tower_reference: str | None = None,
    full_clip: bool = False,
    tower_safetensors: bool = True,
    old_buffers: bool = False,
    config_changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint in the layout of `liuhaotian/llava-v1.5-7b` and returns its folder.

    The tower's folder `tiny-clip` is written beside `folder`; with `tower="inside"` it holds only the two configs
    and the tower's weights are in the shards. `tower_reference` is what `mm_vision_tower` says (default: the name
    `tiny-clip`). `full_clip` writes the tower as a CLIPModel with a text part; `old_buffers` adds the buffers of old
    releases.
    """
    folder, sizes = Path(folder), sizes or TinySizes()
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(sizes, seed, vocab_size=sizes.vocabulary or tokenizer_size()).to(dtype)
    weights, tower_weights = split_liuhaotian(model)
    tower_folder = folder.parent / TOWER_FOLDER
    write_tower(
        tower_folder,
        model.config.vision_config,
        None if tower == "inside" else tower_weights,
        full_clip=full_clip,
        safetensors=tower_safetensors,
        old_buffers=old_buffers,
    )
    if tower == "inside":
        weights |= {f"model.vision_tower.vision_tower.{name}": value for name, value in tower_weights.items()}
    if old_buffers:
        for layer in range(sizes.layers):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_weights(folder, weights, shards=shards, safetensors=safetensors)
    config = liuhaotian_config(sizes, model_type, tower_reference or TOWER_FOLDER, dtype)
    write_json(folder / "config.json", config | dict(config_changes or {}))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    write_tokenizer_model(folder)
    return folder


def make_llava_hf(
    folder: str | Path,
    *,
    sizes: TinySizes | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    config_changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint in the layout of `llava-hf/llava-1.5-7b-hf` (tokenizer.json only) and returns its folder."""
    folder, sizes = Path(folder), sizes or TinySizes()
    folder.mkdir(parents=True, exist_ok=True)
    image_id = tokenizer_size()
    model = tiny_model(sizes, seed, vocab_size=image_id, image_id=0)
    grow_vocabulary(model, image_id + 8)
    weights = {hf_name(name): value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    write_weights(folder, weights, shards=shards, safetensors=True)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "projector_hidden_act": "gelu",
        "text_config": text_fields(sizes, image_id + 8) | {"model_type": "llama", "pad_token_id": image_id + 1},
        "vision_config": vision_fields(sizes) | {"model_type": "clip_vision_model"},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": sizes.image_tokens,
        "pad_token_id": image_id + 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config | dict(config_changes or {}))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": image_id + 1})
    write_json(folder / "preprocessor_config.json", preprocessor_fields(sizes))
    write_tokenizer_json(folder, extra=("<image>", "<pad>"))
    return folder


def make_image(path: str | Path | None = None, width: int = 50, height: int = 34, seed: int = 0) -> Image.Image:
    """A coloured noise picture; written to `path` where one is given."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    image = Image.fromarray(pixels.numpy())
    if path is not None:
        image.save(path)
    return image


def tiny_model(sizes: TinySizes, seed: int, vocab_size: int, image_id: int = 0) -> LlavaForConditionalGeneration:
    """The stock class with random weights large enough that different contexts give different tokens."""
    config = LlavaConfig(
        text_config=LlamaConfig(**text_fields(sizes, vocab_size)),
        vision_config=CLIPVisionConfig(**vision_fields(sizes)),
        image_token_index=image_id,
        image_seq_length=sizes.image_tokens,
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.25 if "embed" in name else sizes.spread)
        model.lm_head.weight[:3] = 0
    torch.set_rng_state(state)
    return model


def grow_vocabulary(model: LlavaForConditionalGeneration, vocab_size: int) -> None:
    """Adds zero rows to both ends of the vocabulary, so that the old rows stay as they are."""
    for module in (model.get_input_embeddings(), model.lm_head):
        extra = torch.zeros(vocab_size - module.weight.shape[0], module.weight.shape[1])
        module.weight = torch.nn.Parameter(torch.cat([module.weight.detach(), extra]))
    model.config.text_config.vocab_size = vocab_size


def hf_name(name: str) -> str:
    """Name inside the stock class -> name in the llava-hf release; the same for every transformers version."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name)
    return re.sub(r"^model\.multi_modal_projector\.", "multi_modal_projector.", name)


def split_liuhaotian(
    model: LlavaForConditionalGeneration,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights under their liuhaotian names: (language model and projector, CLIP tower as `vision_model.*`)."""
    weights, tower = {}, {}
    for key, value in model.state_dict().items():
        name, value = hf_name(key), value.detach().contiguous().clone()
        if name.startswith("vision_tower."):
            tower[name.removeprefix("vision_tower.")] = value
            continue
        name = name.removeprefix("language_model.")
        name = name.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
        weights[name.replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")] = value
    return weights, tower


def write_tower(
    folder: Path,
    config: CLIPVisionConfig,
    weights: Mapping[str, torch.Tensor] | None,
    *,
    full_clip: bool = False,
    safetensors: bool = True,
    old_buffers: bool = False,
) -> None:
    """Writes a CLIP folder: config, image processor config and, unless `weights` is None, the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = TinySizes(
        vision_hidden=config.hidden_size, vision_layers=config.num_hidden_layers,
        vision_heads=config.num_attention_heads, image_size=config.image_size, patch_size=config.patch_size,
    )  # fmt: skip
    fields: dict[str, Any] = vision_fields(sizes)
    if full_clip:
        fields = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 16,
                  "vision_config": fields | {"model_type": "clip_vision_model"},
                  "text_config": {"model_type": "clip_text_model", "hidden_size": 16}}  # fmt: skip
    else:
        fields |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    write_json(folder / "config.json", fields)
    write_json(folder / "preprocessor_config.json", preprocessor_fields(sizes))
    if weights is None:
        return
    weights = {name: value.contiguous() for name, value in weights.items()}
    if full_clip:
        weights |= {"logit_scale": torch.ones(()), "visual_projection.weight": torch.ones(16, sizes.vision_hidden),
                    "text_projection.weight": torch.ones(16, 16),
                    "text_model.final_layer_norm.weight": torch.ones(16)}  # fmt: skip
    if old_buffers:
        weights["vision_model.embeddings.position_ids"] = torch.arange(sizes.image_tokens + 1)[None]
    write_weights(folder, weights, shards=1, safetensors=safetensors)


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], *, shards: int, safetensors: bool) -> None:
    """One file, or `shards` files with an index, in name order."""
    stem, ending = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    names = sorted(weights)
    size = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        part = {name: weights[name] for name in names[number * size : (number + 1) * size]}
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{ending}"
        if safetensors:
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(value.numel() * value.element_size() for value in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{ending}.index.json", index)


def liuhaotian_config(sizes: TinySizes, model_type: str, tower: str, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as LlavaLlamaForCausalLM writes it."""
    return text_fields(sizes, sizes.vocabulary or tokenizer_size()) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": model_type,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": sizes.vision_hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": tower,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.31.0",
    }


def text_fields(sizes: TinySizes, vocab_size: int) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.max_positions,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def vision_fields(sizes: TinySizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": 2 * sizes.vision_hidden,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "projection_dim": sizes.vision_hidden,
        "hidden_act": "quick_gelu",
    }


def preprocessor_fields(sizes: TinySizes) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": sizes.image_size, "width": sizes.image_size},
        "size": {"shortest_edge": sizes.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }

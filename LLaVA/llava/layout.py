"""The two public layouts of LLaVA-1.5, and the stock `LlavaConfig` of either.

liuhaotian: `LlavaLlamaForCausalLM`, a Llama config with `mm_*` fields; the CLIP tower has a folder of its own.
llava-hf: `LlavaForConditionalGeneration`, a config with `text_config` and `vision_config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from .errors import UserError
from .files import read_object
from .hub import Source, is_repository_name
from .loading import load_errors

CONFIG_FILE = "config.json"
MODEL_TYPES = ("llava", "llava_llama")
# liuhaotian's vocabulary has no id for pictures (its placeholder is negative, and an id past the end has no
# embedding row), so the id of `<unk>` is used: a tokenizer with byte fallback never produces it, and the processor
# keeps it out of padding and of prompts with a literal `<unk>`.
UNKNOWN_TOKEN_ID = 0
SELECT_STRATEGY = {"patch": "default", "cls_patch": "full"}
CLIP_TYPES = ("clip", "clip_vision_model")

Layout = Literal["liuhaotian", "llava-hf"]


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint is, its config.json as written, and the layout. `tower` is None in llava-hf."""

    source: Source
    fields: dict[str, Any]
    layout: Layout
    tower: Source | None

    @property
    def aspect(self) -> Literal["pad", "crop"]:
        """How pictures become square: `image_aspect_ratio`, or padding if the config has none (llava-hf)."""
        return "pad" if self.fields.get("image_aspect_ratio", "pad") == "pad" else "crop"


def open_checkpoint(source: Source) -> Checkpoint:
    """Reads config.json and detects the layout.

    Raises:
        UserError: no config.json, or a model that is not LLaVA-1.5; the message says what it is.
    """
    path = source.require(CONFIG_FILE, "model config")
    fields = read_object(path, "model config")
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or []
    if model_type == "llava" and "text_config" in fields and "vision_config" in fields:
        return Checkpoint(source, fields, "llava-hf", None)
    if model_type in MODEL_TYPES and "mm_vision_tower" in fields:
        if architectures and "LlavaLlamaForCausalLM" not in architectures:
            raise UserError("not a LLaVA-1.5 model", path, f"architectures {architectures}")
        _check_supported(fields, path)
        return Checkpoint(source, fields, "liuhaotian", _tower_source(source, str(fields["mm_vision_tower"])))
    raise UserError("not a LLaVA-1.5 model", path, f"model_type {model_type!r}, architectures {architectures}")


def _check_supported(fields: dict[str, Any], path: Path) -> None:
    """Refuses settings of other LLaVA generations, which the stock class of 1.5 does not support."""
    allowed: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
        "mm_resampler_type": (None,),
        "mm_vision_select_feature": (*SELECT_STRATEGY, None),
    }
    for name, values in allowed.items():
        default = "linear" if name == "mm_projector_type" else None
        if (value := fields.get(name, default)) not in values:
            raise UserError(f"unsupported {name} {value!r}", path, "only LLaVA-1.5 is supported")


def _tower_source(source: Source, reference: str) -> Source:
    """`mm_vision_tower`: an absolute folder, a folder in or beside the model's, or a hub repository.

    The hub revision applies to the model only.
    """
    folder = source.folder
    places = [Path(reference)] if Path(reference).is_absolute() else []
    if not places and folder is not None:
        places = [folder / reference, folder.resolve().parent / reference]
    for place in places:
        if place.is_dir():
            return Source.of(place)
    if not is_repository_name(reference):
        fix = f"mm_vision_tower of {source.name}/{CONFIG_FILE}"
        raise UserError("vision tower not found", reference, fix)
    return Source.of(reference, {name: value for name, value in source.hub.items() if name != "revision"})


def build_config(checkpoint: Checkpoint) -> LlavaConfig:
    """The stock config of either layout, every size from the files.

    Raises:
        UserError: a config is missing or has invalid values.
    """
    with load_errors("model config is not valid", Path(checkpoint.source.name) / CONFIG_FILE):
        if checkpoint.layout == "llava-hf":
            return LlavaConfig.from_dict(dict(checkpoint.fields))
        return _liuhaotian_config(checkpoint)


def _liuhaotian_config(checkpoint: Checkpoint) -> LlavaConfig:
    fields = checkpoint.fields
    assert checkpoint.tower is not None
    vision = _vision_config(checkpoint.tower)
    strategy = SELECT_STRATEGY[fields.get("mm_vision_select_feature") or "patch"]
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "dtype", "torch_dtype", "rope_parameters"}
    text = {name: fields[name] for name in known if fields.get(name) is not None}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if name not in text:
            raise ValueError(f"no {name}")
    return LlavaConfig(
        text_config=LlamaConfig(**text, rope_parameters=_rope(fields)),
        vision_config=vision,
        image_token_index=UNKNOWN_TOKEN_ID,
        image_seq_length=count_image_tokens(vision, strategy),
        projector_hidden_act="gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        dtype=fields.get("dtype") or fields.get("torch_dtype"),
        image_aspect_ratio=checkpoint.aspect,
    )


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of old configs as `rope_parameters`."""
    if fields.get("rope_parameters") is not None:
        return dict(fields["rope_parameters"])
    scaling = dict(fields.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    return {**scaling, "rope_type": kind, "rope_theta": float(fields.get("rope_theta") or 10000.0)}


def _vision_config(tower: Source) -> CLIPVisionConfig:
    path = tower.require(CONFIG_FILE, "vision tower config")
    fields = read_object(path, "vision tower config")
    model_type = fields.get("model_type")
    if model_type not in CLIP_TYPES:
        raise UserError("vision tower is not a CLIP model", path, f"model_type {model_type!r}")
    if model_type == "clip":
        fields = {**(fields.get("vision_config_dict") or {}), **(fields.get("vision_config") or {})}
    return CLIPVisionConfig.from_dict({name: value for name, value in fields.items() if name != "model_type"})


def count_image_tokens(vision: Any, strategy: str) -> int:
    """Features of one picture: one for each patch, and one for the class token if the strategy is "full"."""
    sides = vision.image_size, vision.patch_size
    size, patch = (side if isinstance(side, int) else max(side) for side in sides)
    return (size // patch) ** 2 + (strategy == "full")

"""The families of models: one row for each, read by decoding, data generation, training and evaluation.

A family is a folder ``eagle/families/<name>/`` with ``target.py`` (how the model is run) and ``template.py`` (how its
training conversations are written). To add one, write both and add its row to `FAMILIES`. This module imports neither
torch nor transformers; the classes are imported when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import UserError
from llava.files import read_object
from llava.hub import HUB_KEYS, Source
from llava.loading import load_errors

if TYPE_CHECKING:
    from eagle.families.base import Target
    from eagle.families.template import Template


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: what shards, drafts and `Target.family` call it.
        model_types: values of ``model_type`` in a base model's config.json.
        target: adapter, ``module:class``.
        template: training template, ``module:class``.
        training_name: ``--model_type`` of training; with ``_t`` or ``_v`` that of the allocation.
        eval_model: ``--model`` of lmms-eval.
    """

    name: str
    model_types: tuple[str, ...]
    target: str
    template: str
    training_name: str
    eval_model: str

    def target_class(self) -> type[Target]:
        return _imported(self.target)

    def template_class(self) -> type[Template]:
        return _imported(self.template)


FAMILIES: tuple[Family, ...] = (
    Family(
        "llava",
        model_types=("llava", "llava_llama"),
        target="eagle.families.llava.target:LlavaTarget",
        template="eagle.families.llava.template:LlavaTemplate",
        training_name="llava_v15",
        eval_model="llava_msd",
    ),
    Family(
        "llava_next",
        model_types=("llava_next",),
        target="eagle.families.llava_next.target:LlavaNextTarget",
        template="eagle.families.llava_next.template:LlavaNextTemplate",
        training_name="llava_next",
        eval_model="llava_next_msd",
    ),
    Family(
        "qwen2_vl",
        model_types=("qwen2_vl",),
        target="eagle.families.qwen2_vl.target:Qwen2VLTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen2_vl",
        eval_model="qwen2_vl_msd",
    ),
    Family(
        "qwen2_5_vl",
        model_types=("qwen2_5_vl",),
        target="eagle.families.qwen2_vl.target:Qwen2_5VLTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen2_5_vl",
        eval_model="qwen2_5_vl_msd",
    ),
    Family(
        "qwen3_vl",
        model_types=("qwen3_vl",),
        target="eagle.families.qwen3_vl.target:Qwen3VLTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen3_vl",
        eval_model="qwen3_vl_msd",
    ),
    Family(
        "qwen3_vl_moe",
        model_types=("qwen3_vl_moe",),
        target="eagle.families.qwen3_vl.target:Qwen3VLMoeTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen3_vl_moe",
        eval_model="qwen3_vl_moe_msd",
    ),
    Family(
        "qwen3_5",
        model_types=("qwen3_5",),
        target="eagle.families.qwen3_5.target:Qwen3_5Target",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen3_5",
        eval_model="qwen3_5_msd",
    ),
    Family(
        "qwen3_5_moe",
        model_types=("qwen3_5_moe",),
        target="eagle.families.qwen3_5.target:Qwen3_5MoeTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen3_5_moe",
        eval_model="qwen3_5_moe_msd",
    ),
    Family(
        "gemma3",
        model_types=("gemma3",),
        target="eagle.families.gemma3.target:Gemma3Target",
        template="eagle.families.gemma3.template:Gemma3Template",
        training_name="gemma3",
        eval_model="gemma3_msd",
    ),
    Family(
        "internvl",
        model_types=("internvl",),
        target="eagle.families.internvl.target:InternVLTarget",
        template="eagle.families.internvl.template:InternVLTemplate",
        training_name="internvl",
        eval_model="internvl_msd",
    ),
    Family(
        "llava_onevision",
        model_types=("llava_onevision",),
        target="eagle.families.llava_onevision.target:LlavaOnevisionTarget",
        template="eagle.families.llava_onevision.template:LlavaOnevisionTemplate",
        training_name="llava_onevision",
        eval_model="llava_onevision_msd",
    ),
)
TRAINING_NAMES = {family.training_name: family.name for family in FAMILIES}
"""``--model_type`` -> family."""


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        UserError: there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UserError("unknown family of models", name, f"known: {', '.join(family.name for family in FAMILIES)}")


def family_of(path: str | Path, **hub: Any) -> Family:
    """The family of a base model in a folder or on the hub. Reads only its config.json.

    Raises:
        UserError: there is no config.json, or its ``model_type`` is not supported.
    """
    model_type = read_object(_config_file(path, **hub), "base model config").get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError(f"model_type '{model_type}' is not supported as base model", where=path, fix=f"supported: {known}")


def load_target(path: str | Path, dtype: Any = "auto", device_map: Any = None, **kwargs: Any) -> Target:
    """Loads a base model of any supported family from a folder or the hub.

    Args:
        dtype: a torch dtype or its name, or "auto" for the checkpoint's own (float32 on a CPU that is slow in 16 bit).
        device_map: as in transformers. With None and "auto" the model goes on one accelerator if it fits there
            (`eagle.families.placement`); "auto" spreads it otherwise. `Target.placement` says what was chosen.
        kwargs: hub settings (``revision``, ``cache_dir``, ``local_files_only``, ``token``) and other arguments of
            transformers' ``from_pretrained``, such as ``quantization_config``.

    Raises:
        UserError: the model does not exist, its family is not supported, or it does not fit on the devices.
    """
    from eagle.attention import leave_out_cudnn_attention
    from eagle.families.base import check_attention
    from eagle.families.placement import place

    if isinstance(kwargs.get("attn_implementation"), str):  # before the weights are read
        check_attention(kwargs["attn_implementation"])
    leave_out_cudnn_attention()
    hub = {key: kwargs[key] for key in HUB_KEYS if key in kwargs}
    family = family_of(path, **hub)
    with load_errors("base model cannot be loaded", path, weights=True):
        quantized = kwargs.get("quantization_config") is not None
        placement = place(Source.of(path, hub, "base model"), dtype, device_map, quantized)
        target = family.target_class().load(str(path), dtype=dtype, device_map=placement.device_map, **kwargs)
    target.placement = placement.line
    if target.offloaded:
        raise UserError(
            "a part of the base model did not fit on the devices and was offloaded, where it cannot be decoded with",
            where=path,
            fix="take 16 bit, a quantization_config, a smaller model, more devices, or --device-map cpu",
        )
    return target


def template_of(target: Target) -> Template:
    """The training template of a loaded base model.

    Raises:
        UserError: the family has none.
    """
    config = target.config
    template = family_named(target.family).template_class()
    return template(target.processor, config.image_token_id, getattr(config, "video_token_id", None))


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _config_file(path: str | Path, **hub: Any) -> Path:
    return Source.of(path, hub, "base model").require("config.json", "base model config")

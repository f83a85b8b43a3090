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

from llava.errors import UserError, reason_of
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
        title, published: the models' name and checkpoints, for `python -m eagle.families`.
        model_types: values of ``model_type`` in a base model's config.json.
        target: adapter, ``module:class``.
        template: training template, ``module:class``.
        training_name: ``--model_type`` of training; with ``_t`` or ``_v`` that of the allocation.
        eval_model: ``--model`` of lmms-eval.
        vllm: MSD drafts of it are exported to vLLM. Only families whose drafts were compared there with our loop.
    """

    name: str
    title: str
    published: tuple[str, ...]
    model_types: tuple[str, ...]
    target: str
    template: str
    training_name: str
    eval_model: str
    vllm: bool = False

    def target_class(self) -> type[Target]:
        return _imported(self.target)

    def template_class(self) -> type[Template]:
        return _imported(self.template)


FAMILIES: tuple[Family, ...] = (
    Family(
        "llava",
        title="LLaVA-1.5",
        published=("liuhaotian/llava-v1.5-*", "llava-hf/llava-1.5-*"),
        model_types=("llava", "llava_llama"),
        target="eagle.families.llava.target:LlavaTarget",
        template="eagle.families.llava.template:LlavaTemplate",
        training_name="llava_v15",
        eval_model="llava_msd",
        vllm=True,
    ),
    Family(
        "llava_next",
        title="LLaVA-1.6",
        published=("llava-hf/llava-v1.6-*",),
        model_types=("llava_next",),
        target="eagle.families.llava_next.target:LlavaNextTarget",
        template="eagle.families.llava_next.template:LlavaNextTemplate",
        training_name="llava_next",
        eval_model="llava_next_msd",
        vllm=True,
    ),
    Family(
        "qwen2_vl",
        title="Qwen2-VL",
        published=("Qwen/Qwen2-VL-*",),
        model_types=("qwen2_vl",),
        target="eagle.families.qwen2_vl.target:Qwen2VLTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen2_vl",
        eval_model="qwen2_vl_msd",
        vllm=True,
    ),
    Family(
        "qwen2_5_vl",
        title="Qwen2.5-VL",
        published=("Qwen/Qwen2.5-VL-*",),
        model_types=("qwen2_5_vl",),
        target="eagle.families.qwen2_vl.target:Qwen2_5VLTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen2_5_vl",
        eval_model="qwen2_5_vl_msd",
        vllm=True,
    ),
    Family(
        "qwen3_vl",
        title="Qwen3-VL",
        published=("Qwen/Qwen3-VL-2B, 4B, 8B, 32B",),
        model_types=("qwen3_vl",),
        target="eagle.families.qwen3_vl.target:Qwen3VLTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen3_vl",
        eval_model="qwen3_vl_msd",
        vllm=True,
    ),
    Family(
        "qwen3_vl_moe",
        title="Qwen3-VL with experts",
        published=("Qwen/Qwen3-VL-30B-A3B, 235B-A22B",),
        model_types=("qwen3_vl_moe",),
        target="eagle.families.qwen3_vl.target:Qwen3VLMoeTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen3_vl_moe",
        eval_model="qwen3_vl_moe_msd",
    ),
    Family(
        "qwen3_5",
        title="Qwen3.5",
        published=("Qwen/Qwen3.5-27B and other dense sizes",),
        model_types=("qwen3_5",),
        target="eagle.families.qwen3_5.target:Qwen3_5Target",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen3_5",
        eval_model="qwen3_5_msd",
    ),
    Family(
        "qwen3_5_moe",
        title="Qwen3.5 with experts",
        published=("Qwen/Qwen3.5-35B-A3B and others",),
        model_types=("qwen3_5_moe",),
        target="eagle.families.qwen3_5.target:Qwen3_5MoeTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="qwen3_5_moe",
        eval_model="qwen3_5_moe_msd",
    ),
    Family(
        "gemma3",
        title="Gemma 3",
        published=("google/gemma-3-4b, 12b, 27b",),
        model_types=("gemma3",),
        target="eagle.families.gemma3.target:Gemma3Target",
        template="eagle.families.gemma3.template:Gemma3Template",
        training_name="gemma3",
        eval_model="gemma3_msd",
    ),
    Family(
        "gemma4",
        title="Gemma 4",
        published=("google/gemma-4-E2B, E4B, 26B-A4B, 31B",),
        model_types=("gemma4",),
        target="eagle.families.gemma4.target:Gemma4Target",
        template="eagle.families.gemma4.template:Gemma4Template",
        training_name="gemma4",
        eval_model="gemma4_msd",
    ),
    Family(
        "gemma4_unified",
        title="Gemma 4 unified",
        published=("google/gemma-4-12B",),
        model_types=("gemma4_unified",),
        target="eagle.families.gemma4_unified.target:Gemma4UnifiedTarget",
        template="eagle.families.gemma4.template:Gemma4Template",
        training_name="gemma4_unified",
        eval_model="gemma4_unified_msd",
    ),
    Family(
        "internvl",
        title="InternVL 2.5 to 3.5",
        published=("OpenGVLab/InternVL3-*-hf",),
        model_types=("internvl",),
        target="eagle.families.internvl.target:InternVLTarget",
        template="eagle.families.internvl.template:InternVLTemplate",
        training_name="internvl",
        eval_model="internvl_msd",
    ),
    Family(
        "llava_onevision",
        title="LLaVA-OneVision",
        published=("llava-hf/llava-onevision-*",),
        model_types=("llava_onevision",),
        target="eagle.families.llava_onevision.target:LlavaOnevisionTarget",
        template="eagle.families.llava_onevision.template:LlavaOnevisionTemplate",
        training_name="llava_onevision",
        eval_model="llava_onevision_msd",
    ),
    Family(
        "mistral3",
        title="Mistral 3",
        published=("mistralai/Mistral-Small-3.1-*, Ministral-3-*",),
        model_types=("mistral3",),
        target="eagle.families.mistral3.target:Mistral3Target",
        template="eagle.families.mistral3.template:Mistral3Template",
        training_name="mistral3",
        eval_model="mistral3_msd",
    ),
    Family(
        "glm4v",
        title="GLM-4.1V",
        published=("zai-org/GLM-4.1V-9B-*",),
        model_types=("glm4v",),
        target="eagle.families.glm4v.target:Glm4vTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="glm4v",
        eval_model="glm4v_msd",
    ),
    Family(
        "glm4v_moe",
        title="GLM-4.5V",
        published=("zai-org/GLM-4.5V",),
        model_types=("glm4v_moe",),
        target="eagle.families.glm4v.target:Glm4vMoeTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="glm4v_moe",
        eval_model="glm4v_moe_msd",
    ),
    Family(
        "glm46v",
        title="GLM-4.6V",
        published=("zai-org/GLM-4.6V*",),
        model_types=("glm46v",),
        target="eagle.families.glm4v.target:Glm46VTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="glm46v",
        eval_model="glm46v_msd",
    ),
    Family(
        "glm_ocr",
        title="GLM-OCR",
        published=("zai-org/GLM-OCR",),
        model_types=("glm_ocr",),
        target="eagle.families.glm4v.target:GlmOcrTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="glm_ocr",
        eval_model="glm_ocr_msd",
    ),
    Family(
        "paddleocr_vl",
        title="PaddleOCR-VL",
        published=("PaddlePaddle/PaddleOCR-VL",),
        model_types=("paddleocr_vl",),
        target="eagle.families.paddleocr_vl.target:PaddleOCRVLTarget",
        template="eagle.families.qwen2_vl.template:QwenTemplate",
        training_name="paddleocr_vl",
        eval_model="paddleocr_vl_msd",
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
        device_map: as in transformers. With None and "auto" the model is loaded to one accelerator if it fits
            (`eagle.families.placement`); "auto" spreads it otherwise. `Target.placement` says what was chosen. "meta"
            opens the weight files and does not read their data.
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
    target_class = target_class_of(path, **hub)
    with load_errors("base model cannot be loaded", path, weights=True):
        quantized = kwargs.get("quantization_config") is not None
        placement = place(Source.of(path, hub, "base model"), dtype, device_map, quantized)
        target = target_class.load(str(path), dtype=dtype, device_map=placement.device_map, **kwargs)
    target.placement = placement.line
    if target.offloaded and device_map != "meta":
        raise UserError(
            "a part of the base model did not fit on the devices and was offloaded, where it cannot be decoded with",
            where=path,
            fix="take 16 bit, a quantization_config, a smaller model, more devices, or --device-map cpu",
        )
    return target


def target_class_of(path: str | Path, **hub: Any) -> type[Target]:
    """The adapter of a base model. Reads only its config.json.

    Raises:
        UserError: the family or the text model is not supported, or not in the installed transformers.
    """
    from transformers import __version__

    from eagle.families.layers import check_text_type

    family = family_of(path, **hub)
    try:
        target_class = family.target_class()  # imports transformers' model class
    except ImportError as error:
        raise UserError(
            f"transformers {__version__} does not have the model '{family.name}' ({reason_of(error)})",
            path,
            "install a newer release of transformers",
        ) from error
    text = read_object(_config_file(path, **hub), "base model config").get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if isinstance(kind, str):  # before weights are downloaded
        check_text_type(kind, target_class.text_types)
    return target_class


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

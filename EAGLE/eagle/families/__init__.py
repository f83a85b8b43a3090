"""Target families. To add one, write its adapter and name it in `FAMILIES`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from eagle.attention import leave_out_cudnn_attention
from eagle.families.base import Prefill, Target
from eagle.families.llava.target import LlavaTarget
from eagle.families.llava_next.target import LlavaNextTarget
from eagle.families.qwen2_vl.target import Qwen2_5VLTarget, Qwen2VLTarget
from llava.errors import UserError
from llava.files import read_json
from llava.hub import HUB_KEYS, hub_errors

FAMILIES: tuple[type[Target], ...] = (LlavaTarget, LlavaNextTarget, Qwen2VLTarget, Qwen2_5VLTarget)

__all__ = ["FAMILIES", "Prefill", "Target", "family_of", "load_target"]


def load_target(path: str | Path, dtype: Any = "auto", device_map: Any = None, **kwargs: Any) -> Target:
    """Loads a base model of any supported family from a folder or the hub.

    Args:
        dtype: a torch dtype or its name, or "auto" for the checkpoint's own (float32 on a CPU that is slow in 16 bit).
        device_map: as in transformers.
        kwargs: hub settings (``revision``, ``cache_dir``, ``local_files_only``, ``token``) and whatever else
            transformers' ``from_pretrained`` takes, such as ``quantization_config``.

    Raises:
        UserError: nothing is there, its ``model_type`` is none of ours, or the devices have no room for all of it.
    """
    leave_out_cudnn_attention()
    hub = {key: kwargs[key] for key in HUB_KEYS if key in kwargs}
    target = family_of(path, **hub).load(str(path), dtype=dtype, device_map=device_map, **kwargs)
    if target.offloaded:
        raise UserError(
            "a part of the base model found no room on the devices and was offloaded, where it cannot be decoded with",
            where=path,
            fix="take 16 bit, a quantization_config, a smaller model, more devices, or --device-map cpu",
        )
    return target


def family_of(path: str | Path, **hub: Any) -> type[Target]:
    """The adapter for a base model, chosen by its config.json; nothing else is read.

    Raises:
        UserError: nothing is there, or its ``model_type`` is none of ours.
    """
    model_type = read_json(_config_file(path, **hub), "base model config").get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError(f"model_type '{model_type}' is not supported as base model", where=path, fix=f"supported: {known}")


def _config_file(path: str | Path, **hub: Any) -> Path:
    if Path(path).is_dir():
        return Path(path) / "config.json"
    with hub_errors("base model", path):
        return Path(hf_hub_download(str(path), "config.json", **hub))

"""Write the trained target in the liuhaotian LLaVA-1.5 layout.

python -m pocket.recipe.export --checkpoint pocket/build --out pocket/llava
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava.arguments import OneLineParser
from llava.errors import run_cli
from llava.files import write_json

from .encode import MEAN, SIDE, STD
from .model import TEXT, VISION

TOWER = "clip-vit-pocket"
MAX_LENGTH = 4096
RENAMES = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
)
VISION_PREFIX = "model.vision_tower."


def model_config() -> dict[str, Any]:
    """config.json of the language model with the mm_* fields of LLaVA-1.5."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", **TEXT, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "pretraining_tp": 1, "use_cache": True,
        "initializer_range": 0.02, "max_length": MAX_LENGTH, "torch_dtype": "bfloat16",
        "image_aspect_ratio": "pad", "mm_vision_tower": TOWER, "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_resampler_type": None, "use_mm_proj": True,
        "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": True,
    }  # fmt: skip


def processor_config() -> dict[str, Any]:
    """preprocessor_config.json of the vision tower."""
    return {
        "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": SIDE, "width": SIDE},
        "size": {"shortest_edge": SIDE}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": list(MEAN), "image_std": list(STD), "resample": 3,
        "rescale_factor": 1 / 255,
    }  # fmt: skip


def split_tensors(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Language model (with projector) and vision tower under their published names, in bfloat16."""
    language, vision = {}, {}
    for name, tensor in state.items():
        rounded = tensor.detach().to(torch.bfloat16).contiguous()
        if name.startswith(VISION_PREFIX):
            vision["vision_model." + name.removeprefix(VISION_PREFIX).removeprefix("vision_model.")] = rounded
            continue
        for old, new in RENAMES:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        language[name] = rounded
    return language, vision


def _write_shards(language: dict[str, torch.Tensor], out: Path) -> None:
    """Two .bin parts of about the same size and their index."""
    total = sum(t.numel() * t.element_size() for t in language.values())
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    done, weight_map = 0, {}
    for name in sorted(language, key=_order):
        part = 0 if done < total // 2 else 1
        parts[part][name] = language[name].clone()
        weight_map[name] = f"pytorch_model-0000{part + 1}-of-00002.bin"
        done += language[name].numel() * language[name].element_size()
    for i, part_tensors in enumerate(parts):
        torch.save(part_tensors, out / f"pytorch_model-0000{i + 1}-of-00002.bin")
    write_json(out / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _order(name: str) -> tuple[int, int, str]:
    """Embeddings, layers by number, the rest."""
    if name.startswith("model.layers."):
        return 1, int(name.split(".")[2]), name
    return (0 if "embed" in name else 2), 0, name


def export(state: dict[str, torch.Tensor], tokenizer_folder: Path, out: Path) -> None:
    """Write the whole model folder, replacing one that is there only when the new one is complete."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / TOWER).mkdir(parents=True)
    language, vision = split_tensors(state)
    _write_shards(language, fresh)
    save_file(vision, str(fresh / TOWER / "model.safetensors"), metadata={"format": "pt"})
    tower = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "num_channels": 3,
             "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "torch_dtype": "bfloat16", **VISION}  # fmt: skip
    write_json(fresh / TOWER / "config.json", tower)
    write_json(fresh / TOWER / "preprocessor_config.json", processor_config())
    write_json(fresh / "config.json", model_config())
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": MAX_LENGTH}
    write_json(fresh / "generation_config.json", generation)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer_folder / name, fresh / name)
    put_in_place(fresh, out)


def put_in_place(fresh: Path, out: Path) -> None:
    """A finished folder takes the place of the old one."""
    if out.exists():
        shutil.rmtree(out)
    os.replace(fresh, out)


def command(doc: str | None, export: Callable[[dict[str, torch.Tensor], Path, Path], None]) -> None:
    """The command line of an export: the last checkpoint of a training run into a model folder."""
    parser = OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    path = args.checkpoint / "checkpoint.pt"
    if not path.exists():
        parser.error(f"no checkpoint: {path}")
    export(torch.load(path, map_location="cpu", weights_only=True)["model"], args.checkpoint, args.out)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: command(__doc__, export)))

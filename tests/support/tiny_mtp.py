"""Tiny random MTP layers, in the layout of Qwen3.5's checkpoints. No pytest in here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def mtp_tensors(text: dict[str, Any], one_each: bool = False) -> dict[str, torch.Tensor]:
    """The tensors for a text model's config. The head often repeats the last token, as tiny models do.

    Args:
        one_each: experts have tensors of their own, as in Qwen3.5; otherwise they are stacked, as in Qwen3.6.
    """
    size, heads, groups, width = (
        text[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    layer = "mtp.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.fc.weight": (size, 2 * size),
        f"{layer}.self_attn.q_proj.weight": (2 * heads * width, size),
        f"{layer}.self_attn.k_proj.weight": (groups * width, size),
        f"{layer}.self_attn.v_proj.weight": (groups * width, size),
        f"{layer}.self_attn.o_proj.weight": (size, heads * width),
        f"{layer}.self_attn.q_norm.weight": (width,),
        f"{layer}.self_attn.k_norm.weight": (width,),
    }
    norms = ("mtp.norm", "mtp.pre_fc_norm_hidden", "mtp.pre_fc_norm_embedding")
    norms += (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
    shapes |= {f"{norm}.weight": (size,) for norm in norms}
    parts = {f"{layer}.mlp": text.get("intermediate_size")}
    count = text.get("num_experts")
    if count:
        inner = text["moe_intermediate_size"]
        parts = {f"{layer}.mlp.shared_expert": text["shared_expert_intermediate_size"]}
        shapes |= {f"{layer}.mlp.gate.weight": (count, size), f"{layer}.mlp.shared_expert_gate.weight": (1, size)}
        if one_each:
            parts |= {f"{layer}.mlp.experts.{index}": inner for index in range(count)}
        else:
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = (count, 2 * inner, size)
            shapes[f"{layer}.mlp.experts.down_proj"] = (count, size, inner)
    for part, inner in parts.items():
        shapes |= {f"{part}.{name}_proj.weight": (inner, size) for name in ("gate", "up")}
        shapes[f"{part}.down_proj.weight"] = (size, inner)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) / 4 for name, shape in sorted(shapes.items())}
    tensors["mtp.fc.weight"][:, size:] += 2 * torch.eye(size)
    return tensors


def add_mtp(base: str | Path, shards: bool = False, drop: tuple[str, ...] = (), **settings: Any) -> Path:
    """Adds the tensors to a base's checkpoint and returns its folder.

    Args:
        shards: gives them a file of their own, with an index.
        drop: tensors to leave out.
        settings: of `mtp_tensors`.
    """
    base = Path(base)
    config = json.loads((base / "config.json").read_text())
    tensors, own = mtp_tensors(config["text_config"], **settings), load_file(base / FILE)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (base / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(own | tensors, base / FILE, metadata={"format": "pt"})
        return base
    files = {"model-1.safetensors": own, "model-2.safetensors": tensors}
    for file, part in files.items():
        save_file(part, base / file, metadata={"format": "pt"})
    (base / FILE).unlink()
    names = {name: file for file, part in files.items() for name in part}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return base


def extract_mtp(base: str | Path, folder: str | Path) -> Path:
    """Copies config and MTP tensors of a base into a folder of their own."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    tensors = {name: value for name, value in load_file(Path(base) / FILE).items() if name.startswith("mtp.")}
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text((Path(base) / "config.json").read_text())
    return folder

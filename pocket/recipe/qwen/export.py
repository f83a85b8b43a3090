"""Write the trained target in the layout of Qwen/Qwen2-VL-7B-Instruct.

python -m pocket.recipe.qwen.export --checkpoint pocket/build/qwen --out pocket/qwen2vl
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava.files import write_json
from pocket.recipe.encode import MEAN, STD
from pocket.recipe.export import command, put_in_place

from .encode import PROCESSOR, TEMPLATE
from .model import ids_of, published_config
from .tokenizer import FILES, load_tokenizer

MIDDLE = 8
"""The first layer of the second shard."""
RENAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of the published checkpoints, in bfloat16."""
    out = {}
    for name, tensor in state.items():
        for old, new in RENAMES:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        out[name] = tensor.detach().to(torch.bfloat16).contiguous()
    return out


def _write_shards(tensors: dict[str, torch.Tensor], out: Path) -> None:
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        late = name.startswith("model.layers.") and int(name.split(".")[2]) >= MIDDLE
        shards[late or name in ("model.norm.weight", "lm_head.weight")][name] = tensor
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, str(out / file), metadata={"format": "pt"})
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def processor_config() -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        **PROCESSOR, "image_mean": list(MEAN), "image_std": list(STD), "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }  # fmt: skip


def export(state: dict[str, torch.Tensor], tokenizer_folder: Path, out: Path) -> None:
    """Write the whole model folder, replacing one that is there only when the new one is complete."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tokenizer = load_tokenizer(tokenizer_folder)
    _write_shards(published_names(state), fresh)
    ids = ids_of(tokenizer)
    write_json(fresh / "config.json", published_config(tokenizer))
    write_json(fresh / "preprocessor_config.json", processor_config())
    write_json(fresh / "chat_template.json", {"chat_template": TEMPLATE})
    write_json(fresh / "generation_config.json", {
        "bos_token_id": ids["bos_token_id"], "pad_token_id": ids["bos_token_id"],
        "eos_token_id": [ids["eos_token_id"], ids["bos_token_id"]], "do_sample": False,
    })  # fmt: skip
    for name in FILES:
        shutil.copy(tokenizer_folder / name, fresh / name)
    put_in_place(fresh, out)


if __name__ == "__main__":
    command(__doc__, export)

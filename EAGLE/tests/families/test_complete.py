"""A checkpoint that lacks a tensor is refused, in every family; transformers would fill it with random values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import make_liuhaotian, make_llava_hf
from tiny_stock import make_llava_next, make_qwen

from eagle.families import load_target
from llava import UserError

MAKERS: dict[str, Callable[[Path], Path]] = {
    "llava_hf": make_llava_hf,
    "llava, original": make_liuhaotian,
    "llava_next": make_llava_next,
    "qwen2_vl": make_qwen,
    "qwen2_vl, tied": lambda folder: make_qwen(folder, tied=True),
    "qwen2_5_vl": lambda folder: make_qwen(folder, version="2.5"),
}
PARTS = {"language model": "layers.1.mlp.up_proj", "vision": "vis"}


def changed(folder: Path, part: str, how: str) -> str:
    """Removes or cuts the first tensor of a part; returns the end of its name."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(tensors):
            if part in name and tensors[name].ndim == 2:
                tensor = tensors.pop(name)
                if how == "cut":
                    tensors[name] = tensor[:-1].clone()
                save_file(tensors, path, metadata={"format": "pt"})
                return name.split(".", 2)[-1]
    pytest.skip("the weights are not in safetensors")


@pytest.mark.parametrize("how", ["missing", "cut"])
@pytest.mark.parametrize("part", PARTS.values(), ids=list(PARTS))
@pytest.mark.parametrize("family", MAKERS)
def test_a_broken_tensor_is_named(family: str, part: str, how: str, tmp_path: Path) -> None:
    folder = MAKERS[family](tmp_path / "base")  # loads as it is: test_families.py
    name = changed(folder, part, how)
    with pytest.raises(UserError) as raised:
        load_target(folder, dtype=torch.float32)
    assert name.split(".")[-2] in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("family", ["llava_hf", "llava, original", "qwen2_vl"])
def test_a_quantised_weight_without_a_word_in_the_config_is_refused(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """transformers would take its numbers as they are."""
    folder = MAKERS[family](tmp_path / "base")
    done = False
    for path in (*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("pytorch_model*.bin"))):
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        for name in [each for each in tensors if each.endswith("layers.1.mlp.up_proj.weight") and "vis" not in each]:
            tensors[name], done = tensors[name].to(dtype), True
        if path.suffix == ".safetensors":
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            torch.save(tensors, path)
    assert done
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has values of .*names no quantisation"):
        load_target(folder, dtype=torch.float32)

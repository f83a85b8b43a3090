"""The reader of weight files: shapes without data, selected tensors, one-line errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava.errors import UserError
from llava.hub import Source
from llava.weights import find_weights, read_first, read_shapes, read_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}
SAVERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda folder: _save(folder / "model.safetensors", save_file),
    "bin": lambda folder: _save(folder / "pytorch_model.bin", torch.save),
    "bin before torch 1.6": lambda folder: _save(
        folder / "pytorch_model.bin",
        lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    ),
}


def _save(path: Path, save: Callable[[dict[str, torch.Tensor], Path], object]) -> Path:
    save(TENSORS, path)
    return path


@pytest.mark.parametrize("kind", SAVERS)
def test_shapes_and_selected_tensors(tmp_path: Path, kind: str) -> None:
    path = SAVERS[kind](tmp_path)
    assert find_weights(Source.of(tmp_path)) == [path]
    assert read_shapes([path]) == {"a": (2, 3), "b": (4,), "c": ()}
    assert {name: value.dtype for name, value in read_tensors([path]).items()} == {
        name: value.dtype for name, value in TENSORS.items()
    }
    (name, tensor), *others = read_tensors([path], ["a", "absent"]).items()
    assert name == "a" and torch.equal(tensor, TENSORS["a"]) and not others
    assert torch.equal(read_first(Source.of(tmp_path), ["absent", "b", "a"]), TENSORS["b"])
    assert read_first(Source.of(tmp_path), ["absent"]) is None


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("read", [read_shapes, read_tensors])
def test_a_truncated_file_is_named_by_every_reader(tmp_path: Path, kind: str, read: Callable[..., object]) -> None:
    path = SAVERS[kind](tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError, match=f"weight file is damaged or truncated: .*{path.name}") as caught:
        read([path])
    assert "\n" not in str(caught.value)


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    SAVERS["bin"](tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    path = SAVERS["safetensors"](tmp_path)
    assert find_weights(Source.of(tmp_path)) == [path]


def test_an_index_that_names_the_wrong_file(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Source.of(tmp_path)
    assert torch.equal(read_first(source, ["a"]), TENSORS["a"])
    with pytest.raises(UserError, match=r"lacks b.*one\.safetensors"):
        read_first(source, ["b"])
    with pytest.raises(UserError, match=r"weight files missing.*two\.safetensors"):
        read_first(source, ["c"])

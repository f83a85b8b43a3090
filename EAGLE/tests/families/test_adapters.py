"""A LoRA adapter in the place of a base or a draft is named as such, with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import make_liuhaotian

from eagle.doctor import State
from eagle.doctor.models import check_base
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.families.base_weights import load_base_tensors
from llava.errors import UserError
from llava.hub import Source


@pytest.fixture(params=["peft", "LLaVA"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder as peft writes it, or as LLaVA's training does, which adds the base's config."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    if request.param == "LLaVA":
        (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
        (folder / "non_lora_trainables.bin").write_bytes(b"")
    return folder


@pytest.mark.parametrize("load", [load_target, load_base_tensors, load_draft])
def test_an_adapter_is_named(load: Callable[[Path], Any], adapter: Path) -> None:
    with pytest.raises(UserError) as error:
        load(adapter)
    line = str(error.value)
    assert f"is a LoRA adapter of owner/base, not a whole model: {adapter}" in line
    assert "merge_and_unload()" in line


def test_doctor_names_an_adapter(adapter: Path) -> None:
    (problem,) = [check for check in check_base(str(adapter), hub=False)[1] if check.state is State.PROBLEM]
    assert "LoRA adapter of owner/base" in problem.found


def test_a_merged_model_that_still_has_the_adapter_config_loads(tmp_path: Path) -> None:
    base = make_liuhaotian(tmp_path / "base")
    (base / "adapter_config.json").write_text("{}")
    assert Source.of(base).folder == base and load_base_tensors(base).embed.ndim == 2

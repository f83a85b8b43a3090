"""A base model that the engine does not reproduce is refused when it is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import transformers
from tiny_draft import make_draft
from tiny_llava import make_liuhaotian, make_llava_hf
from tiny_stock import make_llava_next, make_qwen

from eagle import MSDModel
from eagle.arguments import add_model_options
from eagle.decode import msd
from eagle.decode import self_check as module
from eagle.decode.self_check import compare, prompt_of, self_check
from eagle.families import FAMILIES, Target, load_target
from eagle.families.base import Target as Base
from eagle.families.gemma3.target import Gemma3Target
from eagle.families.qwen2_vl.target import Qwen2VLTarget
from eagle.kv_cache import KVCache
from llava.errors import UserError

WINDOW = 200
"""Longer than the shortest prompt with a picture."""
MAKERS: dict[str, Callable[..., Path]] = {
    "llava": make_liuhaotian,
    "llava-hf": make_llava_hf,
    "llava_next": make_llava_next,
    "qwen2_vl": make_qwen,
    "windows": lambda folder: make_qwen(folder, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "gemma3": tiny_families.make_gemma3,
    "gemma4": tiny_families.make_gemma4,
    "qwen3_5": tiny_families.make_qwen3_5,
}
OTHERS: dict[str, Callable[..., Path]] = {
    "qwen2_5_vl": lambda folder: make_qwen(folder, version="2.5"),
    "qwen3_vl": tiny_families.make_qwen3_vl,
    "qwen3_vl_moe": lambda folder: tiny_families.make_qwen3_vl(folder, moe=True),
    "qwen3_5_moe": lambda folder: tiny_families.make_qwen3_5(folder, moe=True),
    "gemma4 experts": lambda folder: tiny_families.make_gemma4(folder, kind="experts"),
    "gemma4 plain": lambda folder: tiny_families.make_gemma4(folder, kind="plain"),
    "gemma4 unified": lambda folder: tiny_families.make_gemma4(folder, kind="unified"),
    "mistral3": tiny_families.make_mistral3,
    "glm4v": tiny_families.make_glm,
    "glm4v_moe": lambda folder: tiny_families.make_glm(folder, "glm4v_moe", moe=True),
    "glm_ocr": lambda folder: tiny_families.make_glm(folder, "glm_ocr"),
    "paddleocr_vl": tiny_families.make_paddleocr,
    "internvl": tiny_families.make_internvl,
    "onevision": tiny_families.make_onevision,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model by its name, made once."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            for family in FAMILIES:
                if name in family.model_types:
                    try:
                        family.target_class()
                    except ImportError:
                        pytest.skip(f"transformers {transformers.__version__} does not have {name}")
            made[name] = {**MAKERS, **OTHERS}[name](tmp_path_factory.mktemp("made") / "base")
        return made[name]

    return base


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are checked at load, other than in the other tests."""
    monkeypatch.setattr(msd, "check_target", self_check)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records."""
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "self-checks"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    """The targets that were tested."""
    tested: list[Target] = []
    monkeypatch.setattr(module, "compare", lambda target: (tested.append(target), compare(target)))
    return tested


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*MAKERS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_right_ones_pass(name: str, dtype: torch.dtype, bases: Callable[[str], Path]) -> None:
    target = load_target(bases(name), dtype=dtype)
    state, own = torch.random.get_rng_state(), target.model.generation_config
    compare(target)
    assert torch.equal(torch.random.get_rng_state(), state) and target.model.generation_config is own


def no_mask(target: Base, mask: Any, past: Any, depths: Any) -> Any:
    return torch.zeros_like(mask)


def no_window(target: Base, mask: Any, past: Any, depths: Any) -> Any:
    return {"full_attention": mask, "sliding_attention": mask} if target.layers.by_type else mask


def stay(cache: KVCache, bases: Any, paths: Any) -> None:
    cache.truncate([base + len(path) for base, path in zip(bases, paths, strict=True)])


WRONG = {
    "masks": ("llava-hf", Base, "masks_by_layer", no_mask),
    "window": ("windows", Base, "masks_by_layer", no_window),
    "positions": ("qwen2_vl", Qwen2VLTarget, "text_positions", lambda _, rows: rows.expand(3, -1, -1) + 3),
    "rows of the cache": ("llava", KVCache, "keep", stay),
    "prompt": ("gemma3", Gemma3Target, "read_prompt", Base.read_prompt),
    "cap of the logits": ("gemma4", None, "logit_cap", None),
    "states": ("qwen3_5", KVCache, "keep", stay),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_engine_that_differs_is_refused(
    what: str, bases: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, owner, attribute, wrong = WRONG[what]
    folder = bases(name)
    monkeypatch.setattr(owner or type(load_target(folder)), attribute, wrong)  # older transformers lack some classes
    with pytest.raises(UserError, match="logits of the engine differ") as raised:
        MSDModel.from_pretrained(folder, dtype="float32")
    assert str(folder) in str(raised.value) and not cache.exists()
    MSDModel.from_pretrained(folder, dtype="float32", self_check=False)


def test_a_prompt_is_longer_than_the_window(bases: Callable[[str], Path]) -> None:
    length = {
        name: prompt_of(load_target(bases(name)), "What?")["input_ids"].shape[1] for name in ("qwen2_vl", "windows")
    }
    assert length["qwen2_vl"] < WINDOW < length["windows"]


def test_one_slip_of_rounding_is_not_a_difference(
    bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, found = load_target(bases("llava-hf")), [torch.full((6,), 1.0), torch.zeros(6)]
    monkeypatch.setattr(module, "differences", lambda *_: found.pop(0))
    compare(target)
    assert not found


def test_a_base_that_passed_is_not_tested_again(
    bases: Callable[[str], Path], cache: Path, forwards: list[Target], tmp_path: Path
) -> None:
    base = bases("llava-hf")
    draft = make_draft(tmp_path / "draft", load_target(base, dtype="float32"))
    for folder in (None, draft, None):
        MSDModel.from_pretrained(base, folder, dtype="float32")
    assert len(forwards) == 1 and len(list(cache.iterdir())) == 1
    MSDModel.from_pretrained(base, dtype="bfloat16")
    MSDModel.from_pretrained(base, dtype="float32", attn_implementation="eager")
    assert len(forwards) == 3


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_changed_config_is_tested(
    file: str, bases: Callable[[str], Path], cache: Path, forwards: list[Target], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bases("llava-hf").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    MSDModel.from_pretrained(bases("llava-hf"), dtype="float32")
    MSDModel.from_pretrained(copy, dtype="float32")
    assert len(forwards) == 1  # the place of the folder does not matter
    fields = json.loads((copy / file).read_text())
    change = {"image_std": [0.5, 0.5, 0.5]} if file != "config.json" else {"vision_feature_layer": -1}
    (copy / file).write_text(json.dumps({**fields, **change}))
    MSDModel.from_pretrained(copy, dtype="float32")
    assert len(forwards) == 2


def test_other_versions_are_tested(
    bases: Callable[[str], Path], cache: Path, forwards: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_target(bases("llava-hf"))
    self_check(target)
    monkeypatch.setattr(module, "versions", lambda: {"transformers": "99.0"})
    self_check(target)
    assert len(forwards) == 2


def test_a_base_of_nan(bases: Callable[[str], Path], cache: Path) -> None:
    target = load_target(bases("llava-hf"), dtype="float32")
    with torch.no_grad():
        target.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="the base model's output is not a number"):
        self_check(target)
    assert not cache.exists()


def test_it_can_be_switched_off(bases: Callable[[str], Path], cache: Path, forwards: list[Target]) -> None:
    MSDModel.from_pretrained(bases("llava-hf"), self_check=False)
    assert not forwards and not cache.exists()
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    given = ["--base-model", "base"]
    assert parser.parse_args(given).self_check and not parser.parse_args([*given, "--no-self-check"]).self_check


@pytest.mark.parametrize("how", ["a file", "a name that the system does not take"])
def test_a_folder_that_cannot_be_written(
    how: str, bases: Callable[[str], Path], cache: Path, forwards: list[Target], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if how == "a file":
        cache.parent.write_text("a file")
    else:
        monkeypatch.setenv("MSD_CACHE", str(cache.parent / ("x" * 300)))
    for _ in range(2):
        self_check(load_target(bases("llava-hf")))
    assert len(forwards) == 2 and "not kept for next time" in caplog.text


def test_too_little_memory_is_said(
    bases: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "engine_logits", full)
    self_check(load_target(bases("llava-hf")))
    assert "no memory for the self-check" in caplog.text and not cache.exists()


ODD = {
    "vision_feature_layer": ("llava-hf", {"vision_feature_layer": 99}),
    "vision_feature_layer, negative": ("llava-hf", {"vision_feature_layer": -99}),
    "mm_vision_select_layer": ("llava", {"mm_vision_select_layer": -99}),
    "vision heads": ("llava-hf", {"vision_config.num_attention_heads": -2}),
    "vision heads, Qwen": ("qwen2_vl", {"vision_config.num_heads": -2}),
    "mrope_section": ("qwen2_vl", {"text_config.rope_parameters.mrope_section": [1, 1, 99]}),
    "mrope_section, short": ("qwen2_vl", {"text_config.rope_parameters.mrope_section": [1]}),
    "vision_feature_layer, tiles": ("llava_next", {"vision_feature_layer": 99}),
    "spatial_merge_size": ("qwen2_vl", {"vision_config.spatial_merge_size": 4}),
}


@pytest.mark.parametrize("what", ODD)
def test_values_that_fail_with_the_first_picture_are_found(
    what: str, bases: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    name, changes = ODD[what]
    original = bases(name)
    copy = tmp_path / "parent" / "base"
    copy.mkdir(parents=True)
    for path in original.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for tower in original.parent.glob("tiny-clip"):
        (copy.parent / tower.name).symlink_to(tower)
    fields = json.loads((copy / "config.json").read_text())
    for place, value in changes.items():
        *parts, last = place.split(".")
        inside = fields
        for part in parts:
            inside = inside[part]
        inside[last] = value
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError) as raised:
        MSDModel.from_pretrained(copy, dtype="float32")
    assert str(copy) in str(raised.value) and "unexpected" not in str(raised.value)

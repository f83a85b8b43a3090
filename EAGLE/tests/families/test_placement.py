"""One accelerator if the model fits there; spread over all of them only if not; the CPU only without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import make_llava_hf

from eagle.families import placement
from eagle.families.placement import ROOM, SPARE, place, weight_bytes
from llava.hub import Source

GB = 10**9


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(make_llava_hf(tmp_path / "base"))


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_up(*free: int | None) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        devices = [(f"cuda:{index}", each) for index, each in enumerate(free)]
        monkeypatch.setattr(placement, "free_memory", lambda: devices)

    return set_up


def test_the_device_with_the_most_free_memory(source: Source, accelerators: Any) -> None:
    accelerators(5 * GB, 9 * GB)
    for given in (None, "auto"):
        found = place(source, "auto", given, quantized=False)
        assert found.device_map == {"": "cuda:1"} and "9.0 GB free on cuda:1" in found.line


def test_a_model_that_does_not_fit_is_spread(
    source: Source, accelerators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "weight_bytes", lambda *_: 14 * GB)
    need = int(ROOM * 14 * GB) + SPARE
    accelerators(need - 1, need - 2)
    assert place(source, "auto", None, quantized=False).device_map == "auto"
    accelerators(need, 0)
    assert place(source, "auto", None, quantized=False).device_map == {"": "cuda:0"}


@pytest.mark.parametrize("given", ["cpu", "cuda:1", "balanced", {"": 0}])
def test_what_the_caller_says_is_kept(source: Source, accelerators: Any, given: Any) -> None:
    accelerators(9 * GB)
    assert place(source, "auto", given, quantized=False) == (given, "")
    assert place(source, "auto", None, quantized=True) == (None, "")


def test_without_an_accelerator_nothing_is_chosen(source: Source) -> None:
    assert place(source, "auto", None, quantized=False) == (None, "")


def test_a_device_that_does_not_tell_its_memory_is_used(source: Source, accelerators: Any) -> None:
    accelerators(None)
    assert place(source, "auto", None, quantized=False).device_map == {"": "cuda:0"}


def test_size_of_the_weights(source: Source) -> None:
    """The checkpoint is in float16; asked for in float32 it takes twice as much."""
    files = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))  # type: ignore[union-attr]
    own, wide = weight_bytes(source, "auto"), weight_bytes(source, torch.float32)
    assert (wide == 2 * own and own == pytest.approx(files, rel=0.05)) or own == wide

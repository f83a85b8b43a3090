"""Errors of loading become one line, in one place."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llava.errors import UserError
from llava.loading import load_errors

POINTER = "version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SafetensorError("Error while deserializing header: header too large"), "header too large"),
        (ImportError("requires bitsandbytes: `pip install bitsandbytes`\nmore"), "requires bitsandbytes: `pip"),
        (TypeError("f() got an unexpected keyword argument 'x'"), "argument 'x'"),
        (ValueError("Validation error for field 'size':\n    TypeError: expected int"), "'size': TypeError: expected"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_any_error_of_a_library_is_one_line(error: Exception, said: str) -> None:
    with pytest.raises(UserError) as raised, load_errors("draft cannot be loaded", "owner/draft"):
        raise error
    line = str(raised.value)
    assert line.startswith("draft cannot be loaded: owner/draft (") and said in line and "\n" not in line
    assert "more" not in line and raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        UserError("known"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_reported_elsewhere_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, load_errors("draft cannot be loaded", "owner/draft"):
        raise error
    assert raised.value is error


def test_a_damaged_file_of_the_folder_is_named(tmp_path: Path) -> None:
    def line(weights: bool = True) -> str:
        with pytest.raises(UserError) as raised, load_errors("cannot be loaded", tmp_path, weights):
            raise KeyError("no idea")
        return str(raised.value)

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert line() == f"cannot be loaded: {tmp_path} ('no idea')"
    (tmp_path / "config.json").write_text("[]")
    assert line() == f"config.json is not a JSON object: {tmp_path / 'config.json'}"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert "damaged" in line() and "no idea" in line(weights=False)
    (tmp_path / "model.safetensors").write_text(POINTER)
    assert "git lfs pull" in line() and "model.safetensors" in line()

"""`Target.prepare` takes pictures in every form, in each family."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llava import make_image, make_llava_hf
from tiny_stock import make_llava_next, make_qwen

from eagle.families import Target, load_target
from llava.errors import UserError

MAKERS = {"llava": make_llava_hf, "llava_next": make_llava_next, "qwen2_vl": make_qwen}


@pytest.fixture(scope="module", params=MAKERS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(MAKERS[request.param](tmp_path_factory.mktemp("pictures") / "base"), dtype="float32")


def test_pictures_in_every_form(target: Target, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a.png", 60, 60)
    prompt = target.chat_prompt("What?", 1)
    wanted = target.prepare(prompt, [image])["pixel_values"]
    array = np.asarray(image)
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    forms: list[Any] = [
        image, [[image]], [tmp_path / "a.png"], [(tmp_path / "a.png").as_uri()], f"data:image/png;base64,{data}",
        [array], array[None], torch.from_numpy(array.copy()).permute(2, 0, 1)[None], str(tmp_path / "a.png"),
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(target.prepare(prompt, form)["pixel_values"], wanted), type(form)


def test_what_is_no_picture_is_one_line(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for form, said in (
        (["https://example.org/a.png"], "HF_HUB_OFFLINE"), ([5], "not a picture"),
        (["data:image/png;base64,@"], "base64"), (["file:///nowhere.png"], "picture not found"),
        ([np.zeros((2, 2, 9))], "not a picture"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as raised:
            target.prepare(target.chat_prompt("What?", 1), form)
        assert "\n" not in str(raised.value)

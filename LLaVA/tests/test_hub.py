"""Models named by their hub repository, from a cache written here, without a download."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_llava import make_image, make_liuhaotian, make_llava_hf

from llava import UserError, load_model, load_pretrained
from llava.hub import Source, is_repository_name, split_hub_options

COMMIT = "0" * 40


def publish(folder: Path, cache: Path, name: str, revision: str = "main") -> None:
    """Puts a folder into a hub cache, as a download of `name` at `revision` would."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_liuhaotian_with_its_tower_in_another_repository(tmp_path: Path, revision: str) -> None:
    folder = make_liuhaotian(tmp_path / "model", tower_reference="tiny/clip")
    cache = tmp_path / "cache"
    publish(folder, cache, "tiny/llava", revision)
    publish(tmp_path / "tiny-clip", cache, "tiny/clip")
    hub = {"cache_dir": str(cache), "local_files_only": True, "revision": revision}
    model, processor = load_pretrained("tiny/llava", **hub)
    local, _ = load_pretrained(make_liuhaotian(tmp_path / "other" / "model"))
    inputs = processor("<image>\nHow many?", make_image())
    assert torch.equal(model(**inputs).logits, local(**inputs).logits)
    assert model.config.name_or_path == "tiny/llava"


def test_llava_hf(tmp_path: Path) -> None:
    folder = make_llava_hf(tmp_path / "model")
    publish(folder, tmp_path / "cache", "tiny/llava-hf")
    hub = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model, processor = load_pretrained("tiny/llava-hf", **hub)
    inputs = processor("<image>\nHow many?", make_image())
    assert torch.equal(model(**inputs).logits, load_model(folder)(**inputs).logits)


def test_unknown_repository_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is not a folder here, and the hub did not give its config\.json: tiny/nothing"
    ) as caught:
        load_model("tiny/nothing", cache_dir=str(tmp_path), local_files_only=True)
    assert "\n" not in str(caught.value)


def test_names_of_repositories() -> None:
    assert all(is_repository_name(name) for name in ("liuhaotian/llava-v1.5-7b", "a/b.c_d"))
    assert not any(is_repository_name(name) for name in ("llava", "a/b/c", "/a/b", "../b", "./b", "a b/c", "a/b/"))
    with pytest.raises(UserError, match="model not found: llava"):
        Source.of("llava")


def test_hub_options_are_split_from_the_rest() -> None:
    options = {"revision": "v2", "token": None, "max_memory": {0: 1}, "cache_dir": "c"}
    assert split_hub_options(options) == ({"revision": "v2", "cache_dir": "c"}, {"max_memory": {0: 1}})


@pytest.mark.parametrize("text", ["407 Proxy Authentication Required\nmore", ""])
def test_what_the_http_library_raises_is_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Its errors have no class in common with the hub library's."""

    class ProxyError(Exception):
        pass

    def refused(*_: object, **__: object) -> None:
        raise ProxyError(text)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(UserError, match=text.splitlines()[0] if text else "ProxyError"):
        load_model("tiny/llava")

"""Which model a shard comes from: its commit on the hub, and fingerprints that tell fine-tunes of one base apart."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from corpus_support import Write, allocate, text_record
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llava import make_llava_hf

from eagle.families import load_target
from eagle.ge_data.extract import layer_fingerprint
from eagle.hidden_states.index import INDEX, Index, load_index
from eagle.hidden_states.shards import ShardDataset, Source, write_shard
from eagle.hidden_states.source import commit_of
from llava.errors import UserError

from .test_shards import SOURCE, make_sample

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of owner/tiny in a cache of the hub that is made by hand; no network."""
    folder = tmp_path / "hub" / "models--owner--tiny"
    make_llava_hf(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder / "snapshots" / COMMIT


def test_the_commit_of_a_model_on_the_hub(cached: Path, tmp_path: Path) -> None:
    assert commit_of("owner/tiny") == COMMIT == commit_of(str(cached))
    assert commit_of("owner/other") is None and commit_of("./no/folder") is None and commit_of(str(tmp_path)) is None
    (cached.parents[1] / "refs" / "main").write_text("f" * 40)
    assert commit_of("owner/tiny") is None, "that snapshot is not here"


def test_a_corpus_names_the_commit(cached: Path, annotations: Write, tmp_path: Path) -> None:
    data, out = annotations([text_record(n) for n in range(4)]), tmp_path / "out"
    assert allocate(cached, data, out) == 0
    assert json.loads((out / INDEX).read_text())["commit"] == COMMIT == ShardDataset(out).meta.commit


def forget(path: Path, names: tuple[str, ...]) -> None:
    """Writes a shard as if its program had not known these fields."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["msd"])
    about["source"].update(dict.fromkeys(names))
    save_file(load_file(path), path, metadata={"msd": json.dumps(about)})


def test_what_a_shard_does_not_know_is_no_difference(cached: Path, annotations: Write, tmp_path: Path) -> None:
    """Every folder of an earlier release is without commit; it is continued, and its index then knows it."""
    data, out = annotations([text_record(n) for n in range(7)]), tmp_path / "out"
    assert allocate(cached, data, out, "t", "--limit", "3") == 0
    forget(next(out.glob("rows-*")), ("commit", "layer_fingerprint"))
    (out / INDEX).unlink()
    assert load_index(out).commit is None
    assert allocate(cached, data, out) == 0
    meta = ShardDataset(out).meta
    assert meta.commit == COMMIT and meta.layer_fingerprint and meta.samples == 7
    (out / INDEX).unlink()
    assert load_index(out).commit == COMMIT, "of whichever shard knows it"
    assert len(list(ShardDataset(out))) == 7


def test_another_commit_is_refused(
    cached: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = annotations([text_record(n) for n in range(4)]), tmp_path / "out"
    model = tmp_path / "hub" / "models--owner--tiny" / "snapshots"
    assert allocate(cached, data, out, "t", "--limit", "3") == 0
    index = json.loads((out / INDEX).read_text())
    for path in out.glob("rows-*"):
        forget(path, ("commit",))
    shards = [{**shard, "bytes": (out / shard["file"]).stat().st_size, "sha256": None} for shard in index["shards"]]
    (out / INDEX).write_text(json.dumps({**index, "commit": "f" * 40, "shards": shards}))
    assert allocate(model / COMMIT, data, out) == 2
    assert f"with commit '{'f' * 40}' instead of '{COMMIT}'" in capsys.readouterr().err


def fine_tuned(base: Path, folder: Path) -> Path:
    """The base with other queries in its last layer; its embedding is the same. Both folders have one name."""
    shutil.copytree(base, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = max(name for name in tensors if "language_model" in name and name.endswith("q_proj.weight"))
    tensors[name] = torch.randn(tensors[name].shape).to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_fine_tune_with_the_same_embedding_is_another_model(
    annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_llava_hf(tmp_path / "a" / "base")
    other = fine_tuned(base, tmp_path / "b" / "base")
    prints = [layer_fingerprint(load_target(folder, dtype="float32").text_model) for folder in (base, other)]
    assert prints[0] != prints[1]
    data, out = annotations([text_record(n) for n in range(4)]), tmp_path / "out"
    assert allocate(base, data, out, "t", "--limit", "3") == 0
    assert allocate(other, data, out) == 2
    assert f"with layer_fingerprint '{prints[0]}' instead of '{prints[1]}'" in capsys.readouterr().err
    assert allocate(other, data, tmp_path / "own") == 0
    (tmp_path / "own" / "rows-00000003-00000004.safetensors").rename(out / "rows-00000003-00000004.safetensors")
    with pytest.raises(UserError, match="shard of another corpus, with layer_fingerprint"):
        load_index(out)


@pytest.mark.parametrize("name", ["commit", "layer_fingerprint"])
def test_sources_compared(name: str) -> None:
    one, other = replace(SOURCE, **{name: "a"}), replace(SOURCE, **{name: "b"})
    assert one.differences(other) == f"{name} 'a' instead of 'b'"
    assert one.differences(SOURCE) == SOURCE.differences(one) == ""
    assert SOURCE.completed(one) == one == one.completed(other) and SOURCE.completed(None) == SOURCE
    assert replace(SOURCE, model="x").differences(one) == "model 'x' instead of 'tiny'"


def test_an_index_with_more_knowledge_than_its_shards_is_read(tmp_path: Path) -> None:
    info = write_shard(tmp_path, 0, 1, [(0, make_sample("a", 5, 0))], [], SOURCE)
    Index.of(Source(**{**asdict(SOURCE), "commit": COMMIT}), [info]).save(tmp_path)
    assert ShardDataset(tmp_path)[0].id == "a" and load_index(tmp_path).commit == COMMIT

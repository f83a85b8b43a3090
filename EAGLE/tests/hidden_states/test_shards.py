"""Shards: what is written is read again, and a folder that is not whole says so."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle.hidden_states.index import INDEX, load_index
from eagle.hidden_states.shards import Sample, ShardDataset, Skipped, Source, write_shard
from llava.errors import UserError

H = 8
SOURCE = Source("llava", "tiny", None, "bfloat16", H, 100, 99)


def make_sample(name: str, length: int, images: int) -> Sample:
    generator = torch.Generator().manual_seed(hash(name) % 1000)
    image_mask = torch.zeros(length, dtype=torch.bool)
    image_mask[1 : 1 + images] = True
    return Sample(
        id=name,
        input_ids=torch.randint(0, 99, (length,), generator=generator).masked_fill(image_mask, 99),
        loss_mask=torch.rand(length, generator=generator) > 0.5,
        image_mask=image_mask,
        hidden=torch.randn(length, H, generator=generator).bfloat16(),
        image_features=torch.randn(images, H, generator=generator).bfloat16(),
        image_grids=torch.tensor([[1, 1, images]] if images else []).view(-1, 3).long(),
    )


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, list[Sample]]:
    """Three shards of 3 rows: two samples and a skipped row, only skipped rows, three samples; text and image mixed."""
    samples = [make_sample(f"s{number}", 3 + number, number % 3) for number in range(5)]
    rows = list(enumerate(samples))
    infos = [
        write_shard(tmp_path, 0, 3, rows[:2], [Skipped(9, "x", "too_long")], SOURCE),
        write_shard(tmp_path, 3, 6, [], [Skipped(n, "y", "empty") for n in (10, 11, 12)], SOURCE),
        write_shard(tmp_path, 6, 9, rows[2:], [], SOURCE),
    ]
    load_index(tmp_path).of(SOURCE, infos).save(tmp_path)
    return tmp_path, samples


def assert_same(first: Sample, second: Sample) -> None:
    assert first.id == second.id
    for name in ("input_ids", "loss_mask", "image_mask", "hidden", "image_features", "image_grids"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name


def test_round_trip(corpus: tuple[Path, list[Sample]]) -> None:
    folder, samples = corpus
    data = ShardDataset(folder)
    assert len(data) == 5
    for index, sample in enumerate(samples):
        assert_same(data[index], sample)
    assert_same(data[-1], samples[-1])
    assert data.lengths().tolist() == [len(s.input_ids) for s in samples]
    assert data.image_lengths().tolist() == [int(s.image_mask.sum()) for s in samples]
    with pytest.raises(IndexError):
        data[5]


def test_streams_are_read_by_layer(tmp_path: Path) -> None:
    """Any of the stored layers, in the order that is asked for; others are refused, and none is read by default."""
    plain = [make_sample(name, 4 + place, place) for place, name in enumerate("ab")]
    samples = [replace(each, streams=torch.randn(len(each.input_ids), 3 * H).bfloat16()) for each in plain]
    source = replace(SOURCE, feature_layers=(2, 5, 9))
    write_shard(tmp_path, 0, 2, list(enumerate(samples)), [], source)
    assert ShardDataset(tmp_path).meta.feature_layers == (2, 5, 9)
    data = ShardDataset(tmp_path, (9, 2))
    for place, sample in enumerate(samples):
        streams = sample.streams
        assert streams is not None
        assert ShardDataset(tmp_path)[place].streams is None
        found = data[place].streams
        assert found is not None and torch.equal(found, torch.cat([streams[:, 2 * H :], streams[:, :H]], dim=1))
        out = torch.empty(3, 2 * H).bfloat16()
        data.stored(place).streams_into(out)
        assert torch.equal(out, found[:3])
    with pytest.raises(UserError, match=r"the inputs of layers 2, 3, stored are those of 2, 5, 9: .*--feature-layers"):
        ShardDataset(tmp_path, (2, 3))
    with pytest.raises(ValueError, match="streams is"):
        write_shard(tmp_path, 2, 3, [(2, plain[0])], [], source)
    (tmp_path / "plain").mkdir()
    write_shard(tmp_path / "plain", 0, 1, [(0, plain[0])], [], SOURCE)
    with pytest.raises(UserError, match=r"stored are those of no layer: .*--online"):
        ShardDataset(tmp_path / "plain", (2,))


def test_meta(corpus: tuple[Path, list[Sample]]) -> None:
    folder, samples = corpus
    meta = ShardDataset(folder).meta
    assert meta.source == SOURCE and meta.hidden_size == H and meta.family == "llava"
    assert meta.samples == 5 and meta.tokens == sum(len(s.input_ids) for s in samples)
    assert meta.image_tokens == sum(len(s.image_features) for s in samples)
    assert meta.skipped == {"too_long": 1, "empty": 3}
    written = json.loads((folder / INDEX).read_text())
    assert written["schema"] == 5 and written["counts"]["skipped"] == meta.skipped
    assert all(len(shard["sha256"]) == 64 for shard in written["shards"])


def test_dataset_survives_a_worker_process(corpus: tuple[Path, list[Sample]]) -> None:
    folder, samples = corpus
    data = ShardDataset(folder)
    assert_same(data[0], samples[0])
    assert_same(pickle.loads(pickle.dumps(data))[4], samples[4])


def test_a_shard_is_opened_once_and_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eagle.hidden_states import shards

    for number in range(5):
        write_shard(tmp_path, number, number + 1, [(number, make_sample(str(number), 4, 1))], [], SOURCE)
    read, headers = shards.read_header, []
    monkeypatch.setattr(shards, "read_header", lambda path: headers.append(path) or read(path))
    before = set(os.listdir("/proc/self/fd"))
    data = ShardDataset(tmp_path)
    for _ in range(3):
        assert [sample.id for sample in data] == list("01234")
    assert len(headers) == 5 and set(os.listdir("/proc/self/fd")) == before


def test_the_checksum_is_that_of_the_file_and_safetensors_reads_it(tmp_path: Path) -> None:
    samples = [make_sample(name, length, images) for name, length, images in (("a", 5, 2), ("b", 7, 0), ("c", 4, 3))]
    info = write_shard(tmp_path, 0, 3, list(enumerate(samples)), [], SOURCE)
    path = tmp_path / info.file
    assert hashlib.sha256(path.read_bytes()).hexdigest() == info.sha256
    stored = load_file(path)
    assert torch.equal(stored["hidden"], torch.cat([sample.hidden for sample in samples]))
    assert torch.equal(stored["input_ids"].long(), torch.cat([sample.input_ids for sample in samples]))


def test_a_shard_cut_short_while_it_is_read_is_named(corpus: tuple[Path, list[Sample]]) -> None:
    folder, _ = corpus
    data = ShardDataset(folder)
    assert data[0].id == "s0"
    break_truncated(folder)
    with pytest.raises(UserError, match=r"ends too early.*run the allocation again"):
        list(data)
    break_missing(folder)
    with pytest.raises(UserError, match="cannot be read"):
        data[0]


def test_wide_states_are_stored_in_16_bit(tmp_path: Path) -> None:
    sample = make_sample("a", 5, 2)
    wide = Sample(**{**sample.__dict__, "hidden": sample.hidden.float() + 1e-4})
    write_shard(tmp_path, 0, 1, [(0, wide)], [], SOURCE)
    assert ShardDataset(tmp_path)[0].hidden.dtype == torch.bfloat16


def test_sample_of_wrong_shape_is_refused(tmp_path: Path) -> None:
    sample = make_sample("a", 5, 2)
    wrong = {"image_features": sample.image_features[:1], "image_grids": torch.tensor([[1, 2, 3]])}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=r"image_features|grids of 6 of 2"):
            write_shard(tmp_path, 0, 1, [(0, Sample(**{**sample.__dict__, name: value}))], [], SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_missing_index_is_made_from_the_shards(corpus: tuple[Path, list[Sample]]) -> None:
    folder, samples = corpus
    before = load_index(folder)
    (folder / INDEX).unlink()
    data = ShardDataset(folder)
    assert (data.meta.samples, data.meta.skipped) == (before.samples, before.skipped)
    assert_same(data[4], samples[4])


def test_index_is_completed_by_newer_shards(corpus: tuple[Path, list[Sample]]) -> None:
    folder, _ = corpus
    write_shard(folder, 9, 10, [(20, make_sample("new", 4, 0))], [], SOURCE)
    assert ShardDataset(folder)[-1].id == "new"


def break_empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def break_truncated(folder: Path) -> None:
    path = folder / "rows-00000000-00000003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def break_truncated_without_index(folder: Path) -> None:
    break_truncated(folder)
    (folder / INDEX).unlink()


def break_missing(folder: Path) -> None:
    (folder / "rows-00000000-00000003.safetensors").unlink()


def break_schema(folder: Path) -> None:
    index = folder / INDEX
    index.write_text(index.read_text().replace('"schema": 5', '"schema": 7'))


def break_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"schema": 1,')


def break_fields(folder: Path) -> None:
    (folder / INDEX).write_text('{"schema": 1, "shards": []}')


def break_overlap(folder: Path) -> None:
    write_shard(folder, 1, 2, [], [], SOURCE)


def break_source(folder: Path) -> None:
    write_shard(folder, 9, 10, [], [], Source("llava", "another", None, "bfloat16", H, 100, 99))


def break_foreign(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, folder / "rows-00000009-00000010.safetensors")


BREAKS = {
    break_empty: "no shards",
    break_truncated: "truncated",
    break_truncated_without_index: "truncated",
    break_missing: "missing",
    break_schema: "schema version 7",
    break_index: "line 1 column 14",
    break_fields: "incomplete",
    break_overlap: "overlap",
    break_source: "another corpus",
    break_foreign: "not a shard",
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_damaged_folder_is_named(corpus: tuple[Path, list[Sample]], damage) -> None:
    folder, _ = corpus
    damage(folder)
    with pytest.raises(UserError, match=BREAKS[damage]):
        ShardDataset(folder)


@pytest.mark.parametrize("text", ["", '{"schema": 5,', "[]", "null", "7", "{}", '{"schema": 5}', "\x00", "[" * 99_999])
def test_a_damaged_index_can_be_deleted(corpus: tuple[Path, list[Sample]], text: str) -> None:
    """And its message says so."""
    folder, _ = corpus
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index of the shards .*\(delete it, the shards suffice\)$"):
        ShardDataset(folder)
    (folder / INDEX).unlink()
    assert len(ShardDataset(folder)) == 5


def test_no_folder_and_no_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        ShardDataset(tmp_path / "nothing")
    write_shard(tmp_path, 0, 1, [], [Skipped(0, "a", "empty")], SOURCE)
    with pytest.raises(UserError, match="every record was skipped"):
        ShardDataset(tmp_path)


def test_damaged_shard_is_left_out_for_a_resume(corpus: tuple[Path, list[Sample]]) -> None:
    folder, _ = corpus
    break_truncated(folder)
    assert [shard.start for shard in load_index(folder, strict=False).shards] == [3, 6]

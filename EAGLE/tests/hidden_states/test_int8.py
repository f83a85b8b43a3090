"""Hidden states in 8 bit: how far they are from the target's, how large, and that one folder has one kind."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from corpus_support import Write, allocate, image_record, text_record
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llava import TinySizes, make_liuhaotian

from eagle.conversations import read_conversation
from eagle.families import load_target, template_of
from eagle.ge_data import inspect
from eagle.ge_data.folder import SETTINGS
from eagle.ge_data.reader import collate
from eagle.hidden_states.index import INDEX, Index, load_index
from eagle.hidden_states.quantise import LEVELS, dequantise, quantise
from eagle.hidden_states.shards import DTYPES, Sample, ShardDataset, Source, write_shard
from llava.errors import UserError, run_cli

WIDTH = 1024
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
"""Largest relative error of one rounding to a dtype."""


def states(rows: int, width: int = WIDTH) -> torch.Tensor:
    """Rows of very different size, some with one value far above the others."""
    generator = torch.Generator().manual_seed(7)
    sizes = torch.logspace(-6, 4, rows)[:, None]
    values = torch.randn(rows, width, generator=generator) * sizes
    values[::3, 5] *= 1000
    return values


def sample_of(hidden: torch.Tensor, images: int = 0) -> Sample:
    length, width = hidden.shape
    image_mask = torch.arange(length) < images
    ids, features = torch.arange(length), torch.randn(images, width).bfloat16()
    return Sample("a", ids, ~image_mask, image_mask, hidden, features)


def source_for(hidden: torch.Tensor, dtype: str = "bfloat16", hidden_dtype: str | None = "int8") -> Source:
    return Source("llava", "tiny", None, dtype, hidden.shape[1], 50_000, 0, hidden_dtype=hidden_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_within_half_a_step(dtype: torch.dtype) -> None:
    hidden = states(60)
    values, scales = quantise(hidden)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32
    assert torch.equal(values.abs().amax(-1), torch.full((60,), LEVELS)), "each row uses the whole range"
    error = (dequantise(values, scales, dtype).float() - hidden).abs()
    steps = scales[:, None].expand_as(hidden)
    bound = 0.5 * steps + ROUNDING[dtype] * hidden.abs().amax(-1, keepdim=True)
    assert (error <= bound * (1 + 1e-4)).all()
    assert (error > 0.4 * steps).any(), "the bound is tight"


def test_rows_of_zeros_and_of_the_smallest_numbers_survive() -> None:
    hidden = torch.zeros(4, 8)
    hidden[1, 2], hidden[2, 3], hidden[3] = 1e-8, -torch.finfo(torch.float32).tiny, torch.finfo(torch.bfloat16).max
    values, scales = quantise(hidden)
    back = dequantise(values, scales, torch.bfloat16)
    assert back.isfinite().all() and torch.equal(back[0], torch.zeros(8).bfloat16())
    torch.testing.assert_close(back.float(), hidden, rtol=2**-8, atol=0)
    assert torch.equal(quantise(torch.zeros(0, 8))[1], torch.zeros(0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_shard_gives_16_bit_back(tmp_path: Path, dtype: str) -> None:
    hidden = states(60).clamp(-60_000, 60_000)
    write_shard(tmp_path, 0, 1, [(0, sample_of(hidden, images=3))], [], source_for(hidden, dtype))
    read = ShardDataset(tmp_path)[0]
    assert read.hidden.dtype == DTYPES[dtype] and read.image_features.dtype == DTYPES[dtype]
    expected = dequantise(*quantise(hidden), DTYPES[dtype])
    assert torch.equal(read.hidden, expected)


def test_samples_of_a_shard_keep_their_own_scales(tmp_path: Path) -> None:
    parts = [states(4), 100 * states(7), states(2) / 100]
    samples = [(n, replace(sample_of(part), id=str(n))) for n, part in enumerate(parts)]
    write_shard(tmp_path, 0, 3, samples, [], source_for(parts[0]))
    for part, read in zip(parts, ShardDataset(tmp_path), strict=True):
        assert torch.equal(read.hidden, dequantise(*quantise(part), torch.bfloat16))


def test_bytes_of_a_text_token(tmp_path: Path) -> None:
    hidden = states(500)
    sizes = {}
    for kind in ("int8", None):
        info = write_shard(
            tmp_path / str(kind), 0, 1, [(0, sample_of(hidden))], [], source_for(hidden, "bfloat16", kind)
        )
        sizes[kind] = info.bytes / 500
    hidden_and_embedding = 2 * 2 * WIDTH
    assert sizes["int8"] <= 0.27 * hidden_and_embedding
    assert 0.49 * hidden_and_embedding < sizes[None] <= 0.51 * hidden_and_embedding


def test_allocation_stores_the_targets_states_in_8_bit(annotations: Write, pictures: Path, tmp_path: Path) -> None:
    """From the float32 states of the target: rounded to 8 bit once, not to 16 bit before."""
    base = make_liuhaotian(tmp_path / "base", sizes=TinySizes(hidden=128, heads=4))
    row = image_record(1)
    data, out = annotations([row]), tmp_path / "out"
    assert allocate(base, data, out, "v", "--hidden-dtype", "int8", "--dtype", "float32", pictures=pictures) == 0
    target = load_target(base, dtype="float32")
    item = template_of(target).prepare(read_conversation(row, 0), pictures, 500)
    with torch.inference_mode():
        prefill = target.prefill(collate([item]))
    stored = load_file(next(out.glob("rows-*")))
    values, scales = quantise(prefill.hidden[0])
    assert torch.equal(stored["hidden"], values)
    torch.testing.assert_close(stored["hidden_scale"], scales)
    features = prefill.embeds[0][prefill.image_mask[0]].bfloat16()
    assert torch.equal(stored["image_features"], features)
    assert load_index(out).hidden_dtype == "int8"


def test_inspect_names_the_kind(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = annotations([text_record(1)])
    for flag, shown in (("int8", "stored as int8"), ("auto", "stored as bfloat16")):
        assert allocate(base, data, tmp_path / flag, "t", "--hidden-dtype", flag) == 0
        capsys.readouterr()
        assert run_cli(lambda flag=flag: inspect.main([str(tmp_path / flag), "--model", str(base)])) == 0
        text = capsys.readouterr().out
        assert shown in text and "all right" in text and "The Nile" in text


def test_resumed_in_8_bit(base: Path, annotations: Write, tmp_path: Path) -> None:
    data = annotations([text_record(n) for n in range(7)])
    assert allocate(base, data, tmp_path / "whole", "t", "--hidden-dtype", "int8") == 0
    assert allocate(base, data, tmp_path / "parts", "t", "--hidden-dtype", "int8", "--limit", "4") == 0
    first = next((tmp_path / "parts").glob("rows-*"))
    before = first.read_bytes()
    assert allocate(base, data, tmp_path / "parts", "t", "--hidden-dtype", "int8") == 0
    assert first.read_bytes() == before
    whole, parts = ShardDataset(tmp_path / "whole"), ShardDataset(tmp_path / "parts")
    assert sorted(sample.id for sample in parts) == sorted(f"text{n}" for n in range(7))
    for one, other in zip(whole, parts, strict=True):
        assert one.id == other.id and torch.equal(one.hidden, other.hidden)


@pytest.mark.parametrize(("begun", "then"), [("auto", "int8"), ("int8", "auto")])
def test_one_folder_has_one_kind(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: str, then: str
) -> None:
    data, out = annotations([text_record(n) for n in range(4)]), tmp_path / "out"
    assert allocate(base, data, out, "t", "--hidden-dtype", begun, "--limit", "1") == 0
    assert allocate(base, data, out, "t", "--hidden-dtype", then) == 2
    error = capsys.readouterr().err
    assert f"error: the folder was begun with hidden_dtype '{begun}' instead of '{then}'" in error
    assert load_index(out).samples == 1


def test_a_shard_of_another_kind_is_refused(tmp_path: Path) -> None:
    hidden = states(3)
    write_shard(tmp_path, 0, 1, [(0, sample_of(hidden))], [], source_for(hidden))
    write_shard(tmp_path, 1, 2, [(1, sample_of(hidden))], [], source_for(hidden, hidden_dtype=None))
    with pytest.raises(UserError, match="hidden_dtype None instead of 'int8'"):
        ShardDataset(tmp_path)


LATEST = ("layer_fingerprint", "feature_layers")
NEW = {1: ("hidden_dtype", "regeneration", *LATEST), 2: LATEST, 3: LATEST, 4: ("feature_layers",)}
OLD_SETTINGS = ("model_type", "dtype", "max_length", "seed", "data", "data_sha256", "rows")


def make_old(folder: Path, schema: int) -> None:
    """Turns a folder into one of schema 1 to 4, as earlier releases wrote it."""
    new = NEW[schema]
    shards = []
    for shard in load_index(folder).shards:
        path = folder / shard.file
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["msd"])
        about["schema"] = schema
        for name in new:
            del about["source"][name]
        tensors = {name: tensor for name, tensor in load_file(path).items() if schema >= 3 or "grid" not in name}
        save_file(tensors, path, metadata={"msd": json.dumps(about)})
        shards.append({**asdict(shard), "bytes": path.stat().st_size, "sha256": None})
    index = json.loads((folder / INDEX).read_text())
    for name in new:
        del index[name]
    (folder / INDEX).write_text(json.dumps({**index, "schema": schema, "shards": shards}))
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({name: settings[name] for name in OLD_SETTINGS}))


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_an_old_folder_is_read_and_completed(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], schema: int
) -> None:
    data, out = annotations([text_record(n) for n in range(7)]), tmp_path / "out"
    assert allocate(base, data, out, "t", "--limit", "3") == 0
    sample = ShardDataset(out)[0]
    make_old(out, schema)
    old = ShardDataset(out)
    assert old.meta.hidden_dtype is None and torch.equal(old[0].hidden, sample.hidden)
    assert allocate(base, data, out, "t", "--hidden-dtype", "int8") == 2
    assert "begun with hidden_dtype 'auto' instead of 'int8'" in capsys.readouterr().err
    assert allocate(base, data, out) == 0
    completed = ShardDataset(out)
    assert len(completed) == 7 and torch.equal(completed[0].hidden, sample.hidden)
    assert isinstance(load_index(out), Index) and json.loads((out / INDEX).read_text())["schema"] == 5

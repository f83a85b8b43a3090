"""Several machines, one corpus: parts that make up the whole, and their folders joined to one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from corpus_support import Write, allocate, command, text_record

from eagle.ge_data import allocation, inspect
from eagle.ge_data.allocation import part_of
from eagle.ge_data.folder import SETTINGS
from eagle.hidden_states.index import INDEX, load_index
from eagle.hidden_states.shards import ShardDataset
from llava.errors import UserError, run_cli

ROWS = 11


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("span", [(0, 1), (0, 1000), (5, 131), (63, 66)])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_make_up_the_whole(span: tuple[int, int], parts: int, size: int) -> None:
    at, empty = span[0], 0
    for number in range(parts):
        try:
            first, last = part_of(span, (number, parts), size)
        except UserError:
            empty += 1
            continue
        assert first == at < last, "parts follow each other without gap or overlap"
        assert first in span or first % size == 0, "no shard belongs to two parts"
        assert last - first <= (span[1] - span[0]) // parts + size + 1, "parts are equal but for a shard"
        at = last
    assert at == span[1] and empty < parts
    assert not empty or (span[1] - span[0]) < parts * size


def test_machines_joined_are_the_whole(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where one machine was stopped half-way: the run that joins makes the rest. As in docs/data.md."""
    data = annotations([text_record(n, n % 3 + 1) for n in range(ROWS)])
    assert allocate(base, data, tmp_path / "whole") == 0
    for number in range(2):
        assert allocate(base, data, tmp_path / str(number), "t", "--shard", f"{number}/2") == 0
    parts = [[(shard.start, shard.end) for shard in load_index(tmp_path / str(n)).shards] for n in range(2)]
    assert parts == [[(0, 3)], [(3, 6), (6, 9), (9, 11)]]
    joined = tmp_path / "0"
    for path in (tmp_path / "1").glob("rows-*"):
        shutil.move(path, joined)
    assert allocate(tmp_path / "no model needed", data, joined) == 0
    assert capsys.readouterr().err.count("reading 3 shards for their checksums") == 1
    assert load_index(joined) == load_index(tmp_path / "whole"), "checksums too"
    for one, other in zip(ShardDataset(joined), ShardDataset(tmp_path / "whole"), strict=True):
        assert one.id == other.id and torch.equal(one.hidden, other.hidden)
    assert run_cli(lambda: inspect.main([str(joined)])) == 0
    (joined / "rows-00000003-00000006.safetensors").unlink()
    assert allocate(base, data, joined) == 0
    assert load_index(joined).samples == ROWS and all(shard.sha256 for shard in load_index(joined).shards)


@pytest.mark.parametrize(
    ("value", "message"),
    [("2/2", "'2/2' is not a part"), ("x", "'x' is not a part"), ("0/0", "not a part"), ("-1/2", ""),
     ("1/2/3", "not a part"),
     ("1/8", "part 1/8 of records 0 to 11 is empty"), ("0/8", "part 0/8 of records 0 to 11 is empty")],
)  # fmt: skip
def test_a_part_that_is_none_is_refused(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, message: str
) -> None:
    data = annotations([text_record(n) for n in range(ROWS)])
    assert allocate(base, data, tmp_path / "out", "t", "--shard", value) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_flags_are_not_shortened(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part must not pass for a size."""
    with pytest.raises(SystemExit):
        allocation.parser().parse_args(command(base, tmp_path / "rows.json", tmp_path, "t", "--shard-s", "2"))
    assert "--shard-s" in capsys.readouterr().err


def test_a_shard_that_the_index_missed_gets_its_sum(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill came after the shard and before the index."""
    data, out = annotations([text_record(n) for n in range(ROWS)]), tmp_path / "out"
    assert allocate(base, data, out, "t", "--limit", "6") == 0
    whole = load_index(out)
    type(whole).of(whole.source, list(whole.shards[:1])).save(out)
    assert [bool(shard.sha256) for shard in load_index(out).shards] == [True, False]
    assert allocate(base, data, out, "t", "--limit", "6") == 0
    assert load_index(out) == whole and None not in [
        s["sha256"] for s in json.loads((out / INDEX).read_text())["shards"]
    ]
    capsys.readouterr()
    assert run_cli(lambda: inspect.main([str(out)])) == 0
    assert "all right" in capsys.readouterr().out


def test_a_run_that_made_nothing_binds_nobody(base: Path, annotations: Write, tmp_path: Path) -> None:
    """It failed before its first shard, with settings that are put right in the second run."""
    data, out = annotations([text_record(n) for n in range(3)]), tmp_path / "out"
    assert allocate("./nothing", data, out, "t", "--max-length", "99") == 2
    assert json.loads((out / SETTINGS).read_text())["max_length"] == 99
    assert allocate(base, data, out) == 0
    assert json.loads((out / SETTINGS).read_text())["max_length"] == 2048
    assert allocate(base, data, out, "t", "--max-length", "99") == 2

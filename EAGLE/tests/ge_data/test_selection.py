"""Missing pictures: reported before the model is loaded, repaired by --again, no reason to skip if the disk fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_support import Write, allocate, image_record, rows_of, snapshot
from tiny_llava import make_image

from eagle.conversations import Unusable, open_picture, picture_is_there
from eagle.ge_data import allocation
from eagle.ge_data.selection import MAX_CHECKED
from eagle.hidden_states.index import load_index
from eagle.hidden_states.shards import ShardDataset
from llava.errors import UserError
from llava.image import PictureUnreachable, load_image

ROWS = 12


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of one picture for each of `ROWS` rows."""
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(ROWS):
        make_image(folder / f"p{number}.png", seed=number)
    return folder


def rows() -> list[dict[str, Any]]:
    return [image_record(number, f"p{number}.png") for number in range(ROWS)]


def test_the_wrong_folder_is_said_before_the_model_is_loaded(
    annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong").mkdir()
    out = tmp_path / "out"
    assert allocate("./no/model", annotations(rows()), out, "v", pictures=tmp_path / "wrong") == 2
    error = capsys.readouterr().err
    assert f"none of {ROWS} records that were checked has its pictures: {tmp_path}/wrong/p" in error
    assert "--image_data_path" in error and not list(out.glob("rows-*"))


def test_absolute_names_inside_the_folder_are_as_relative_ones(
    base: Path, own: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also below a link to the folder. A name outside is skipped with its reason; a file of such names is refused."""
    link = tmp_path / "link"
    link.symlink_to(own)
    assert allocate(base, annotations(rows()), tmp_path / "relative", "v", pictures=own) == 0
    for folder, root in ((own, own), (link, link), (own, link)):
        named = [image_record(number, str(folder / f"p{number}.png")) for number in range(ROWS)]
        out = tmp_path / f"{folder.name}-{root.name}"
        assert allocate(base, annotations(named), out, "v", pictures=root) == 0
        assert rows_of(out)[0] == rows_of(tmp_path / "relative")[0] and not load_index(out).skipped
    make_image(tmp_path / "elsewhere.png", seed=1)
    outside = image_record(0, str(tmp_path / "elsewhere.png"))
    assert allocate(base, annotations([outside, *rows()[1:]]), tmp_path / "one", "v", pictures=own) == 0
    assert load_index(tmp_path / "one").skipped == {"outside_picture": 1}
    capsys.readouterr()
    assert (
        allocate(base, annotations([{**outside, "id": str(n)} for n in range(3)]), tmp_path / "all", "v", pictures=own)
        == 2
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"{tmp_path}/elsewhere.png" in line and f"--image_data_path {own} is the folder" in line


def test_a_share_of_missing_pictures_is_said(
    base: Path, own: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (own / f"p{number}.png").unlink()
    data, out = annotations(rows()), tmp_path / "out"
    assert allocate(base, data, out, "v", pictures=own) == 0
    error = capsys.readouterr().err
    assert f"3 of {ROWS} records that were checked (25%) lack a picture, such as {own}/p" in error
    assert f"python -m eagle.ge_data.download --root {own} --check --annotations {data}" in error
    assert "3 records were skipped because of their pictures; --again repairs their shards later" in error


def test_only_some_rows_of_many_are_looked_at(
    base: Path, own: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def there(path: Path) -> bool:
        seen.append(path)
        return False

    monkeypatch.setattr("eagle.ge_data.selection.picture_is_there", there)
    data = annotations([image_record(number, f"q{number}.png") for number in range(5 * MAX_CHECKED + 1)])
    assert allocate(base, data, tmp_path / "out", "v", pictures=own) == 2
    assert MAX_CHECKED * 0.8 < len(seen) <= MAX_CHECKED and len(set(seen)) == len(seen)


def test_a_few_last_rows_may_all_lack_their_pictures(
    base: Path, own: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corpus whose last rows are gone from the web can be finished all the same."""
    data, out = annotations(rows()), tmp_path / "out"
    assert allocate(base, data, out, "v", "--limit", "9", pictures=own) == 0
    shutil.rmtree(own)
    own.mkdir()
    assert allocate(base, data, out, "v", pictures=own) == 0
    assert "3 of 3 records that were checked (100%) lack a picture" in capsys.readouterr().err
    assert load_index(out).skipped == {"missing_picture": 3}


@pytest.mark.parametrize("harm", ["missing", "broken"])
def test_again_makes_only_shards_whose_pictures_are_back(
    base: Path, own: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    data, out, whole = annotations(rows()), tmp_path / "out", tmp_path / "whole"
    assert allocate(base, data, whole, "v", pictures=own) == 0
    first, last = rows_of(whole)[0][0], rows_of(whole)[0][-1]
    kept = {number: (own / f"p{number}.png").read_bytes() for number in (first, last)}
    for number in kept:
        (own / f"p{number}.png").unlink() if harm == "missing" else (own / f"p{number}.png").write_bytes(b"no picture")
    assert allocate(base, data, out, "v", pictures=own) == 0
    assert load_index(out).skipped == {f"{harm}_picture": 2}
    begun = snapshot(out)

    assert allocate(base, data, out, "v", "--again", pictures=own) == 0
    assert "--again: 0 shards" in capsys.readouterr().err and snapshot(out) == begun, "no picture is back"

    (own / f"p{first}.png").write_bytes(kept[first])
    assert allocate(base, data, out, "v", pictures=own) == 0
    assert snapshot(out) == begun, "without --again nothing is made again"
    assert allocate(base, data, out, "v", "--again", "--shard-size", "5", pictures=own) == 0
    assert "--again: 1 shards have records" in capsys.readouterr().err
    then = snapshot(out)
    changed = {name for name in begun if then[name] != begun[name]}
    assert then.keys() == begun.keys() and changed == {min(begun)}
    assert rows_of(out)[1] == [last] and not list(out.glob(".*.tmp*"))
    listed = [json.loads(line)["row"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert listed == [last]

    (own / f"p{last}.png").write_bytes(kept[last])
    assert allocate(base, data, out, "v", "--again", pictures=own) == 0
    assert load_index(out) == load_index(whole)
    for one, other in zip(ShardDataset(out), ShardDataset(whole), strict=True):
        assert one.id == other.id and torch.equal(one.hidden, other.hidden)


def test_again_within_its_range(base: Path, own: Path, annotations: Write, tmp_path: Path) -> None:
    data, out = annotations(rows()), tmp_path / "out"
    hidden = own.rename(tmp_path / "hidden")
    own.mkdir()
    shutil.copy(hidden / "p0.png", own)
    assert allocate(base, data, out, "v", pictures=own) == 0
    own = hidden
    assert allocate(base, data, out, "v", "--again", "--limit", "6", pictures=own) == 0
    assert load_index(out).skipped == {"missing_picture": 6 - (rows_of(out)[0].index(0) >= 6)}
    assert allocate(base, data, out, "v", "--again", pictures=own) == 0
    assert load_index(out).skipped == {} and sorted(rows_of(out)[0]) == list(range(ROWS))


def test_again_stopped_half_way_is_a_whole_corpus(
    base: Path, own: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The old shards stay until each is replaced, whatever the index has let go of; another model is refused still."""
    data, out = annotations(rows()), tmp_path / "out"
    hidden = own.rename(tmp_path / "hidden")
    own.mkdir()
    for number in range(3):
        shutil.copy(hidden / f"p{number}.png", own)
    assert allocate(base, data, out, "v", pictures=own) == 0
    assert load_index(out).samples == 3

    kept = allocation.AllocationProgress.add_shard

    def stop(self: allocation.AllocationProgress, *what: Any) -> None:
        kept(self, *what)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(allocation.AllocationProgress, "add_shard", stop)
        assert allocate(base, data, out, "v", "--again", pictures=hidden) == 130
    assert 3 < len(ShardDataset(out)) < ROWS
    from tiny_llava import make_liuhaotian

    other = make_liuhaotian(tmp_path / "other" / "base", seed=5)
    assert allocate(other, data, out, "v", "--again", pictures=hidden) == 2
    assert "another model" in capsys.readouterr().err
    assert allocate(base, data, out, "v", "--again", pictures=hidden) == 0
    assert load_index(out).samples == ROWS and all(shard.sha256 for shard in load_index(out).shards)


@pytest.mark.parametrize("name", ["nothing.png", "a.png/b.png", "x" * 5000, "x/" * 3000, "a\0b.png", "\ud800.png", ""])
def test_names_that_no_file_has_are_missing_pictures(pictures: Path, name: str) -> None:
    assert not picture_is_there(pictures / name)
    with pytest.raises(Unusable, match="missing_picture"):
        open_picture(pictures / name)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("where", ["stat", "open"])
def test_a_failing_file_system_is_no_reason_to_skip_rows(
    base: Path, pictures: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], code: int, where: str,
) -> None:  # fmt: skip
    data, out = annotations([image_record(1), image_record(2, "b.png")]), tmp_path / "out"
    stat, opened, fails = Path.stat, __import__("PIL.Image").Image.open, [False]

    def failing(original: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if fails[0] and str(path).endswith("b.png"):
                raise OSError(code, os.strerror(code), str(path))
            return original(path, *args, **kwargs)

        return call

    monkeypatch.setattr(*((Path, "stat", failing(stat)) if where == "stat" else ("PIL.Image.open", failing(opened))))
    monkeypatch.setattr(allocation, "check_pictures", lambda *_: fails.__setitem__(0, True))
    assert allocate(base, data, out, "v", pictures=pictures) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"error: picture cannot be read ({os.strerror(code)}): {pictures / 'b.png'} (check the disk"
    )
    assert not list(out.glob("rows-*"))
    fails[0] = False
    monkeypatch.setattr(allocation, "check_pictures", lambda *_: None)
    assert allocate(base, data, out, "v", pictures=pictures) == 0
    assert load_index(out).samples == 2 and not load_index(out).skipped


def test_a_broken_picture_is_not_out_of_reach(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="broken_picture"):
        open_picture(pictures / "broken.png")
    (tmp_path / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:-60])
    with pytest.raises(UserError) as caught:
        load_image(tmp_path / "cut.png")
    assert not isinstance(caught.value, PictureUnreachable)
    with pytest.raises(PictureUnreachable, match="Is a directory"):
        load_image(tmp_path)

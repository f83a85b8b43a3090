"""The table of the training sets: what it names, what the guide says of it, how its addresses are replaced."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from eagle.ge_data.download import __main__ as download
from eagle.picture_sources import HUB, SOURCES, ArchiveSet, CoverSet, PictureSet, choose
from llava.errors import UserError

GUIDE = Path(__file__).resolve().parents[4] / "image_data" / "README.md"


def test_a_mirror_of_other_bytes_is_not_held_to_the_checksum() -> None:
    (plain,) = choose("coco")
    (mirrored,) = choose("coco", ["coco=http://x/a.zip?x=1"])
    assert isinstance(plain, ArchiveSet) and plain.md5
    assert isinstance(mirrored, ArchiveSet) and mirrored.md5 is None and mirrored.address == "http://x/a.zip?x=1"
    assert [source.name for source in choose("vg")] == ["vg1", "vg2"]
    with pytest.raises(UserError):
        choose("nothing")


def test_guide_and_table_agree() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| ([\d ]+) \| (?:about )?([\d.]+) GB \|", guide, re.MULTILINE)
    told = {path: (int(count.replace(" ", "")), float(size)) for path, count, size in rows}
    sets = [source for source in SOURCES if isinstance(source, PictureSet)]
    assert {path: count for path, (count, _) in told.items()} == {s.path: s.pictures for s in sets}
    assert all(abs(told[s.path][1] - s.size / 1e9) <= 0.5 for s in sets)
    lines = [line for line in guide.splitlines() if line.startswith("python -m eagle.ge_data.download")]
    assert len(lines) >= 3
    for line in lines:
        options = download.parser().parse_args(shlex.split(line)[3:])
        choose(options.only, options.mirror)
    known = {flag for action in download.parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]+", guide)) <= known


def test_table_names_each_thing_once() -> None:
    assert len({source.name for source in SOURCES}) == len({source.path for source in SOURCES}) == len(SOURCES) == 8
    assert [source.name for source in SOURCES if isinstance(source, CoverSet)] == ["ocr_vqa"]
    assert all(source.address.startswith((HUB, "http://", "https://")) for source in SOURCES)

"""Archives: pictures into one flat folder, nothing anywhere else, each complete, nothing unpacked twice."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pytest

from eagle.ge_data.download import unpack as module
from eagle.ge_data.download.unpack import unpack
from llava.errors import UserError

PICTURES = {f"train/{n}.jpg": bytes([n]) * (100 + n) for n in range(4)}
EXPECTED = {Path(name).name: content for name, content in PICTURES.items()}


def make_zip(path: Path, members: Mapping[str, bytes], link: str | None = None) -> Path:
    """A zip archive. ``link``: name of a member that is a symbolic link."""
    with ZipFile(path, "w", ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(ZipInfo(name), content)
        if link:
            info = ZipInfo(link)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(info, "/etc")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".complete"}


def test_pictures_are_unpacked_without_folders(tmp_path: Path) -> None:
    more = {"train/": b"", "__MACOSX/._0.jpg": b"x", "train/.DS_Store": b"x", "README.txt": b"x", "deep/er/B.PNG": b"b"}
    archive = make_zip(tmp_path / "a.zip", {**PICTURES, **more})
    assert unpack(archive, tmp_path / "set" / "images", "set") == 5
    assert contents(tmp_path / "set" / "images") == {**EXPECTED, "B.PNG": b"b"}
    assert os.listdir(tmp_path / "set") == ["images"]


UNSAFE = (
    "../evil.jpg", "train/../../evil.jpg", "..\\evil.jpg", "/evil.jpg", "\\evil.jpg", "C:evil.jpg", "../notes.txt",
)  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_a_path_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    archive = make_zip(tmp_path / "a.zip", {**PICTURES, name: b"evil"})
    with pytest.raises(UserError, match="leaves its folder") as caught:
        unpack(archive, tmp_path / "set" / "images", "set")
    assert str(archive) in str(caught.value) and "nothing of it was unpacked" in str(caught.value)
    assert os.listdir(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("name", ["train/link.jpg", "link"])
def test_a_link(tmp_path: Path, name: str) -> None:
    archive = make_zip(tmp_path / "a.zip", PICTURES, link=name)
    with pytest.raises(UserError, match=f"a link or a special file, '{name}'"):
        unpack(archive, tmp_path / "images", "set")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_a_damaged_archive_is_unpacked_after_it_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", {name: os.urandom(500) for name in PICTURES})
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"archive is damaged.*delete it and run the command again"):
        unpack(archive, tmp_path / "images", "set")
    assert os.listdir(tmp_path) == ["a.zip"]
    archive.write_bytes(whole)
    with ZipFile(archive) as file:
        at = file.infolist()[2].header_offset + 200
    archive.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match="archive is damaged"):
        unpack(archive, tmp_path / "images", "set")
    assert sorted(os.listdir(tmp_path / "images")) == ["0.jpg", "1.jpg"]
    archive.write_bytes(whole)
    done = spy_on_extract(monkeypatch)
    assert unpack(archive, tmp_path / "images", "set") == 4
    assert done == ["2.jpg", "3.jpg"]
    with ZipFile(archive) as file:
        assert contents(tmp_path / "images") == {Path(name).name: file.read(name) for name in PICTURES}


def spy_on_extract(monkeypatch: pytest.MonkeyPatch, stop_before: str | None = None) -> list[str]:
    """Names that are unpacked from now on; Ctrl-C before ``stop_before``."""
    done: list[str] = []
    extract = module._extract

    def spy(file: ZipFile, info: ZipInfo, path: Path) -> None:
        if path.name == stop_before:
            raise KeyboardInterrupt
        done.append(path.name)
        extract(file, info, path)

    monkeypatch.setattr(module, "_extract", spy)
    return done


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "folder with pictures"])
def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    archive, folder = make_zip(tmp_path / "a.zip", PICTURES), tmp_path / "set" / "images"
    if there:
        folder.mkdir(parents=True)
        (folder / "mine.jpg").write_bytes(b"mine")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        spy_on_extract(patch, stop_before="2.jpg")
        unpack(archive, folder, "set")
    assert not (folder / ".complete").exists()
    done = spy_on_extract(monkeypatch)
    assert unpack(archive, folder, "set") == 4
    assert done == ["2.jpg", "3.jpg"]
    assert contents(folder) == {**EXPECTED, **({"mine.jpg": b"mine"} if there else {})}
    assert os.listdir(tmp_path / "set") == ["images"]


def test_existing_pictures_are_kept_in_a_linked_folder(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", PICTURES)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "0.jpg").write_bytes(b"\xff" * 100)
    (tmp_path / "elsewhere" / "1.jpg").write_bytes(b"cut")
    unpack(archive, tmp_path / "images", "set")
    assert (tmp_path / "images").is_symlink()
    assert contents(tmp_path / "elsewhere") == {**EXPECTED, "0.jpg": b"\xff" * 100}


@pytest.mark.parametrize(
    ("members", "message"), [(["a/0.jpg", "b/0.jpg"], "two pictures of the same name"), (["a.txt"], "no picture")]
)
def test_an_archive_without_a_flat_set_of_pictures(tmp_path: Path, members: list[str], message: str) -> None:
    archive = make_zip(tmp_path / "a.zip", dict.fromkeys(members, b"a"))
    with pytest.raises(UserError, match=message):
        unpack(archive, tmp_path / "images", "set")
    assert not (tmp_path / "images").exists()


def test_space_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, folder = make_zip(tmp_path / "a.zip", PICTURES), tmp_path / "images"
    free = sum(map(len, PICTURES.values())) - 1
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(UserError, match=r"not enough space for the pictures of a\.zip"):
        unpack(archive, folder, "set")
    assert os.listdir(tmp_path) == ["a.zip"]
    folder.mkdir()
    (folder / "0.jpg").write_bytes(PICTURES["train/0.jpg"])
    assert unpack(archive, folder, "set") == 4

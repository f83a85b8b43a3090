"""The download command against a loopback server: layout, resume, --check, and sets that fail."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
from corpus_support import Write, image_record, text_record
from file_server import FileServer
from hub_server import HubServer
from huggingface_hub import hf_hub_download

from eagle.conversations import REASONS
from eagle.ge_data.download import __main__ as download
from eagle.ge_data.download import transfer
from eagle.ge_data.download.sources import SOURCES, choose
from eagle.ge_data.folder import locked
from llava.errors import run_cli

from .test_covers import picture

ARCHIVES = [source.name for source in SOURCES if source.kind == "archive"]
RECORDS = b'[{"id": "a", "conversations": []}]'


def archive(name: str, pictures: int = 3) -> bytes:
    buffer = BytesIO()
    with ZipFile(buffer, "w") as file:
        for number in range(pictures):
            file.writestr(f"whatever/{name}{number}.jpg", picture() + bytes(20_000))
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "image_data"


@pytest.fixture
def mirrors(server: FileServer) -> list[str]:
    """All sets on the loopback server, and the options that name it."""
    for name in ARCHIVES:
        server.put(f"{name}.zip", archive(name))
    for cover in ("k1", "k2"):
        server.put(cover, picture("PNG" if cover == "k2" else "JPEG"))
    covers = {name: {"imageURL": server.url(name)} for name in ("k1", "k2", "k3")}
    server.put("ocr_vqa", json.dumps(covers).encode())
    server.put("sharegpt", RECORDS)
    server.put("llava", RECORDS)
    addresses = {**{name: f"{name}.zip" for name in ARCHIVES}, **{n: n for n in ("ocr_vqa", "sharegpt", "llava")}}
    return [f"--mirror={name}={server.url(file)}" for name, file in addresses.items()]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(root: Path, mirrors: list[str], waits: list[float], capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives status, stdout and stderr without the progress bars."""

    def call(*options: str) -> tuple[int, str, str]:
        status = run_cli(lambda: download.main(["--root", str(root), *mirrors, *options]))
        shown = capsys.readouterr()
        errors = [line for line in re.split(r"[\r\n]", shown.err) if line.startswith("error:")]
        return status, shown.out, "\n".join(errors)

    return call


def tree(root: Path) -> list[str]:
    """All files, hidden ones left out."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))


LAYOUT = sorted(
    [
        "annotations/ShareGPT_V3_unfiltered_cleaned_split.json",
        "annotations/llava_v1_5_mix665k.json",
        "ocr_vqa/dataset.json",
        "ocr_vqa/gone.txt",
        "ocr_vqa/images/k1.jpg",
        "ocr_vqa/images/k2.jpg",
        *[f"coco/train2017/coco{n}.jpg" for n in range(3)],
        *[f"gqa/images/gqa{n}.jpg" for n in range(3)],
        *[f"textvqa/train_images/textvqa{n}.jpg" for n in range(3)],
        *[f"vg/VG_100K/vg1{n}.jpg" for n in range(3)],
        *[f"vg/VG_100K_2/vg2{n}.jpg" for n in range(3)],
    ]
)


def test_everything_is_where_the_conversations_name_it(run: Run, root: Path, server: FileServer) -> None:
    status, out, errors = run()
    assert (status, errors) == (0, "")
    assert tree(root) == LAYOUT
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == sorted({Path(name).parts[0] for name in LAYOUT})
    assert "coco: 3 pictures (118,287 expected)" in out and "ocr_vqa: 2 pictures" in out and "1 gone" in out
    assert (root / "ocr_vqa/images/k2.jpg").read_bytes()[:2] == b"\xff\xd8"

    asked = {name: len(file.requests) for name, file in server.files.items()}
    assert run()[0] == 0
    assert {name: len(file.requests) for name, file in server.files.items()} == asked, "it was downloaded again"
    assert tree(root) == LAYOUT


def test_the_checksum_is_not_required_of_a_mirror() -> None:
    (plain,), (mirrored,) = choose("coco"), choose("coco", ["coco=http://x/a.zip?x=1"])
    assert plain.md5
    assert mirrored.md5 is None and mirrored.address == "http://x/a.zip?x=1"


def test_killed_and_resumed(run: Run, root: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    file = server.files["coco.zip"]
    file.drop_after = [20_000]
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "sleep", interrupt)
        assert run("--only", "coco")[0] == 130
    assert sorted(os.listdir(root / "archives")) == ["coco.zip.part", "coco.zip.part.json"]
    assert run("--only", "coco")[0] == 0
    assert file.requests[1].range == "bytes=20000-" and file.sent == len(file.content)
    assert len(tree(root)) == 3


def test_one_set_fails_and_the_others_go_on(run: Run, root: Path, server: FileServer) -> None:
    server.put("gqa.zip", b"", statuses=[404])
    server.put("vg1.zip", archive("vg1")[:-40])
    status, _, errors = run()
    first, second, last = errors.splitlines()
    assert status == 2
    assert first.startswith("error: gqa: the server says 404") and server.url("gqa.zip") in first
    assert second.startswith("error: vg1: archive is damaged") and str(root / "archives" / "vg1.zip") in second
    assert last.startswith("error: 2 of 8 sets failed: gqa, vg1 (")
    assert tree(root) == sorted(
        [*(name for name in LAYOUT if not name.startswith(("gqa", "vg/VG_100K/"))), "archives/vg1.zip"]
    )
    server.put("gqa.zip", archive("gqa"))
    server.put("vg1.zip", archive("vg1"))
    (root / "archives" / "vg1.zip").unlink()
    assert run()[0] == 0 and tree(root) == LAYOUT
    assert len(server.files["coco.zip"].requests) == 1


def test_archives_are_kept_or_brought_along(run: Run, root: Path, server: FileServer) -> None:
    (root / "archives").mkdir(parents=True)
    (root / "archives" / "coco.zip").write_bytes(archive("coco"))
    assert run("--only", "coco,gqa", "--keep-archives")[0] == 0
    assert sorted(os.listdir(root / "archives")) == ["coco.zip", "gqa.zip"]
    assert server.files["coco.zip"].requests == [] and len(server.files["gqa.zip"].requests) == 1
    shutil.rmtree(root / "gqa")
    assert run("--only", "gqa")[0] == 0
    assert len(server.files["gqa.zip"].requests) == 1 and os.listdir(root / "gqa/images")


def test_a_linked_complete_set_is_left_alone(run: Run, root: Path) -> None:
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    for number in range(4):
        (elsewhere / f"{number}.jpg").write_bytes(b"x")
    (root / "coco").mkdir(parents=True)
    (root / "coco" / "train2017").symlink_to(elsewhere)
    assert "3 pictures" in run("--only", "coco")[1], "4 are fewer than the table's"
    (root / "coco" / "train2017" / "coco0.jpg").unlink()
    assert "already there, 6 pictures" in run("--only", "coco")[1], "6 are more than the archive had"


def test_no_space(run: Run, root: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("coco.zip", archive("coco", pictures=30))
    size = len(server.files["coco.zip"].content)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * size - 1))
    status, _, errors = run("--only", "coco,gqa")
    assert status == 2
    expected = rf"error: coco: not enough space for coco: {2 * size / 1e6:.2f} MB needed, "
    assert re.match(expected, errors) and "--root" in errors.splitlines()[0]
    assert not list(root.rglob("coco*")) and len(list(root.glob("gqa/images/*.jpg"))) == 3
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    status, _, errors = run("--only", "ocr_vqa,annotations")
    assert status == 2 and len(errors.splitlines()) == 4
    assert "space for ocr_vqa" in errors and "space for llava_v1_5_mix665k.json" in errors
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "not enough space for the covers of ocr_vqa" in run("--only", "ocr_vqa")[2]


def test_a_full_disk_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "unpack", full)
    status, out, errors = run("--only", "coco,textvqa,sharegpt")
    assert status == 2 and "sharegpt: " in out
    assert errors.startswith("error: coco: cannot write or read a file here (No space left on device)")


def test_the_list_of_covers_from_a_file(run: Run, root: Path, server: FileServer, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"other": {"imageURL": server.url("k1")}}))
    assert run("--only", "ocr_vqa", "--ocr-vqa-list", str(mine))[0] == 0
    assert tree(root) == ["ocr_vqa/images/other.jpg"] and server.files["ocr_vqa"].requests == []
    status, _, errors = run("--only", "ocr_vqa", "--ocr-vqa-list", str(tmp_path / "none.json"))
    assert status == 2 and "not found" in errors


@pytest.mark.parametrize("statuses", [[404], []], ids=["gone", "a page instead"])
def test_no_list_of_covers(run: Run, root: Path, server: FileServer, statuses: list[int]) -> None:
    server.put("ocr_vqa", b"<html>too many downloads</html>", statuses=statuses)
    status, _, errors = run("--only", "ocr_vqa")
    assert status == 2 and "give it as --ocr-vqa-list" in errors.splitlines()[0]
    assert tree(root) == [], "a page that is not a list is not kept"


def test_check_tells_what_is_there(run: Run, root: Path, server: FileServer) -> None:
    status, out, _ = run("--check")
    assert status == 1 and not root.exists() and not any(file.requests for file in server.files.values())
    assert re.search(r"^coco +0 of 118,287 pictures, 118,287 missing +coco/train2017$", out, re.MULTILINE)
    assert re.search(r"^sharegpt +missing", out, re.MULTILINE)
    run("--only", "coco,ocr_vqa,sharegpt")
    status, out, _ = run("--check")
    assert status == 1
    assert re.search(r"^coco +3 of +3 pictures, complete", out, re.MULTILINE)
    assert re.search(r"^ocr_vqa +2 of 207,572 pictures, 1 gone, 207,569 missing", out, re.MULTILINE)
    assert re.search(r"^sharegpt +there", out, re.MULTILINE)
    assert run("--check", "--only", "coco")[0] == 0
    (root / "coco/train2017/coco1.jpg").unlink()
    status, out, _ = run("--check", "--only", "coco")
    assert status == 1 and "2 of       3 pictures, 1 missing" in out


def test_check_of_an_annotation_file(run: Run, root: Path, annotations: Write, server: FileServer) -> None:
    run("--only", "coco,ocr_vqa")
    coco = [image_record(n, f"coco/train2017/coco{n}.jpg") for n in (0, 1, 1, 2)]
    gqa = [image_record(n, f"gqa/images/g{n}.jpg") for n in range(7)]
    covers = [image_record(n, f"ocr_vqa/images/k{n}.jpg") for n in (1, 2, 3, 4)]
    strange = {**image_record(0), "images": ["mine/a.png", "b.png"], "image": None}
    file = annotations([text_record(0), *coco, *gqa, *covers, strange])
    status, out, _ = run("--check", "--annotations", str(file))
    assert status == 1
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        f"{file}: 17 records, 16 with pictures",
        "coco 3 needed, 3 there, 0 missing",
        "gqa 7 needed, 0 there, 7 missing",
        *[f"gqa/images/g{n}.jpg" for n in range(5)],
        "and 2 more",
        "textvqa 0 needed, 0 there, 0 missing",
        "vg1 0 needed, 0 there, 0 missing",
        "vg2 0 needed, 0 there, 0 missing",
        "ocr_vqa 4 needed, 2 there, 2 missing, 1 of them gone from the web",
        "ocr_vqa/images/k3.jpg",
        "ocr_vqa/images/k4.jpg",
        "other 2 needed, 0 there, 2 missing",
        "b.png",
        "mine/a.png",
    ]
    assert run("--check", "--annotations", str(file), "--only", "coco")[0] == 0
    (root / "mine").mkdir()
    (root / "mine" / "a.png").write_bytes(b"x")
    assert "other 2 needed, 1 there, 1 missing" in " ".join(run("--check", "--annotations", str(file))[1].split())
    unusable = [image_record(1, "mine/a.png"), {**image_record(2), "image": 5}, image_record(3, "../a.png")]
    status, out, _ = run("--check", "--annotations", str(annotations(unusable)))
    assert status == 0 and "3 records, 1 with pictures" in out
    assert out.count("1 records name no usable picture") == 2 and REASONS["outside_picture"] in out
    status, out, _ = run("--check", "--annotations", str(annotations([image_record(1, "a\0\n" + 300 * "x")])))
    assert status == 1 and "\0" not in out and max(map(len, out.splitlines())) < 300


def test_check_finds_pictures_by_absolute_names(run: Run, root: Path, annotations: Write, tmp_path: Path) -> None:
    (root / "mine").mkdir(parents=True)
    (root / "mine" / "a.png").write_bytes(b"x")
    names = [str(root / "mine" / "a.png"), str(root / "gqa" / "images" / "g1.jpg"), str(tmp_path / "out.png")]
    rows = [image_record(number, name) for number, name in enumerate(names)]
    out = " ".join(run("--check", "--annotations", str(annotations(rows)))[1].split())
    assert "3 records, 2 with pictures" in out and f"no usable picture: {REASONS['outside_picture']}" in out
    assert "gqa 1 needed, 0 there, 1 missing" in out and "other 1 needed, 1 there, 0 missing" in out


PAGE = b"<html>[quota exceeded]</html>"


@pytest.mark.parametrize("came", [PAGE, b"", b"version https://git-lfs.github.com/spec/v1", RECORDS.rstrip()[:-1]])
def test_a_page_instead_of_an_annotation_file_is_not_kept(
    run: Run, root: Path, server: FileServer, came: bytes
) -> None:
    server.put("llava", came)
    status, out, errors = run("--only", "annotations")
    assert status == 2 and "sharegpt: " in out
    assert (
        errors.startswith("error: llava: the server sent a wrong file, discarded: not an annotation file")
        and server.url("llava") in errors
    )
    assert tree(root) == ["annotations/ShareGPT_V3_unfiltered_cleaned_split.json"]
    server.put("llava", b"\xef\xbb\xbf \n" + RECORDS + b"\n ")
    assert run("--only", "llava")[0] == 0
    path = root / "annotations/llava_v1_5_mix665k.json"
    path.write_bytes(came)
    status, _, errors = run("--only", "llava")
    assert status == 2 and errors.startswith("error: llava: not an annotation file") and str(path) in errors
    assert path.read_bytes() == came


def test_covers_that_are_gone_do_not_fail_the_check(
    run: Run, root: Path, server: FileServer, annotations: Write
) -> None:
    """OCR-VQA ends well: all that can be had is there."""
    server.put("refused", b"", statuses=[403] * 9)
    server.put("page", b"<html>sold out</html>")
    covers = {name: {"imageURL": server.url(name)} for name in ("k1", "k2", "k3", "refused", "page")}
    server.put("ocr_vqa", json.dumps(covers).encode())
    status, out, errors = run("--only", "ocr_vqa")
    assert (status, errors) == (0, "") and "2 pictures" in out and "3 gone from the web" in out
    needed = annotations([image_record(n, f"ocr_vqa/images/{name}.jpg") for n, name in enumerate(covers)])
    status, out, _ = run("--check", "--annotations", str(needed))
    assert status == 0 and "5 needed, 2 there, 3 missing, 3 of them gone from the web" in " ".join(out.split())
    needed = annotations([image_record(n, f"ocr_vqa/images/{name}.jpg") for n, name in enumerate([*covers, "k9"])])
    assert run("--check", "--annotations", str(needed))[0] == 1


BAD = {
    "--only coco,cocoa": "unknown set 'cocoa': --only (known are annotations, coco,",
    "--only ,": "unknown set ''",
    "--mirror coco": "not a mirror",
    "--mirror coco=/tmp/a.zip": "not a mirror",
    "--mirror vg=http://x/a.zip": "unknown set 'vg': --mirror (known are coco, gqa",
    "--annotations rows.json": "--annotations needs --check",
    "--check --annotations nothing.json": "annotation file cannot be read",
    "--workers 0": "--workers",
    "--nonsense": "unknown flag --nonsense",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_options_are_one_line(root: Path, capsys: pytest.CaptureFixture[str], options: str) -> None:
    assert run_cli(lambda: download.main(["--root", str(root), *shlex.split(options)])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD[options] in error
    assert not root.exists()


def test_one_run_at_a_time(run: Run, root: Path, server: FileServer) -> None:
    with locked(root):
        status, _, errors = run("--only", "coco")
    assert status == 2 and "another run" in errors and server.files["coco.zip"].requests == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer) -> Iterator[HubServer]:
    """A hub that has one of the two annotation files."""
    folder = tmp_path / "hub" / "anon8231489123" / "ShareGPT_Vicuna_unfiltered"
    folder.mkdir(parents=True)
    (folder / "ShareGPT_V3_unfiltered_cleaned_split.json").write_bytes(RECORDS)
    (tmp_path / "hub" / "liuhaotian" / "LLaVA-Instruct-150K").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer(tmp_path / "hub") as running:
        monkeypatch.setattr("huggingface_hub.hf_hub_download", partial(hf_hub_download, endpoint=running.address))
        yield running


def test_annotations_from_the_hub(hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--root", str(root), "--only", "annotations"]
    assert run_cli(lambda: download.main(command)) == 2
    shown = capsys.readouterr()
    assert "error: llava: the hub did not give llava_v1_5_mix665k.json" in shown.err
    assert shown.err.splitlines()[-1].startswith("error: 1 of 2 sets failed: llava")
    assert tree(root) == ["annotations/ShareGPT_V3_unfiltered_cleaned_split.json"]
    assert (root / tree(root)[0]).read_bytes() == RECORDS
    asked = len(hub.requests)
    assert run_cli(lambda: download.main([*command[:-1], "sharegpt"])) == 0
    assert len(hub.requests) == asked, "a file that is there is not asked for"


def test_hub_that_cannot_be_reached(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_cli(lambda: download.main(["--root", str(root), "--only", "sharegpt"])) == 2
    first, last = capsys.readouterr().err.splitlines()
    expected = "error: sharegpt: the hub did not give ShareGPT_V3_unfiltered_cleaned_split.json ("
    assert first.startswith(expected) and last.startswith("error: 1 of 1 sets failed: sharegpt")
    assert hub.requests == []

"""One-line errors, exit statuses, atomic writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.errors import LESS_MEMORY, PIPE_STATUS, TRACEBACK, UserError, cli_errors, run_cli
from llava.files import atomic_folder, atomic_write, check_writable, read_json, write_json

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB of which 1 GiB is free."
FULL = f"{SAID} Of the allocated memory 12 GiB is allocated by PyTorch. If reserved memory is large try setting this."


def test_user_error_is_one_line() -> None:
    assert str(UserError("not found")) == "not found"
    assert str(UserError("not found", Path("a/b"), "make it")) == "not found: a/b (make it)"
    assert str(UserError("two\n  lines", "x\ny")) == "two lines: x y"
    assert str(UserError("not found", "a\0b\x1b[31m\udc80é")) == "not found: a\\x00b\\x1b[31m\\udc80é"


def fail(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("main", "status", "stderr"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (lambda: fail(UserError("bad", "x")), 2, "error: bad: x\n"),
        (lambda: fail(KeyboardInterrupt()), 130, "stopped\n"),
        (lambda: fail(SystemExit(3)), 3, ""),
        (lambda: fail(SystemExit("stop")), 1, "stop\n"),
        (lambda: fail(SystemExit()), 0, ""),
        (lambda: fail(torch.OutOfMemoryError(FULL)), 2, f"error: out of memory: {SAID} ({LESS_MEMORY})\n"),
        (lambda: fail(MemoryError()), 2, f"error: out of memory ({LESS_MEMORY})\n"),
    ],
)
def test_exit_status(main, status: int, stderr: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main) == status
    assert capsys.readouterr().err == stderr


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("sizes do not match")])
def test_defects_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), cli_errors():
        fail(error)


def test_a_defect_is_one_line_and_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)
    assert run_cli(lambda: fail(RuntimeError("sizes do\nnot match"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unexpected RuntimeError in test_errors_and_files.py, line ")
    assert "sizes do" in line and TRACEBACK in line
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(RuntimeError):
        run_cli(lambda: fail(RuntimeError("sizes do not match")))


@pytest.mark.parametrize("main", ["[print('x' * 99) for _ in range(10**4)]", "print('x')", "(print('x'), sys.exit(3))"])
def test_a_reader_that_has_left(main: str) -> None:
    """As in ``msd bench | head``: quiet, with the status of SIGPIPE in a shell."""
    code = f"import sys; from llava.errors import run_cli; sys.exit(run_cli(lambda: ({main}, 0)[1]))"
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (PIPE_STATUS, b"")


@pytest.mark.parametrize(("encoding", "written"), [("ascii", b"\\u03c4 \\xe9"), ("latin-1", b"\\u03c4 \xe9")])
def test_a_character_that_the_terminal_lacks_is_written_as_its_number(encoding: str, written: bytes) -> None:
    """A table of results would be lost at its first Greek letter."""
    code = "import sys; from llava.errors import run_cli; sys.exit(run_cli(lambda: print('\u03c4 \xe9')))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, written, b"")


def test_a_current_folder_that_was_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_cli(lambda: 0) == 2
    assert capsys.readouterr().err == "error: the current folder was removed (change to another folder)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    code = "import sys; from llava.errors import run_cli; sys.exit(run_cli(lambda: print('x')))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, timeout=60)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2 and "no room left" in line


def test_a_broken_pipe_that_is_not_stdout_is_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: fail(BrokenPipeError("of a worker"))) == 1
    assert "unexpected BrokenPipeError" in capsys.readouterr().err


def test_the_cause_of_a_user_error_is_shown_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> int:
        try:
            raise KeyError("of the library")
        except KeyError as error:
            raise UserError("cannot be loaded") from error

    monkeypatch.setenv(TRACEBACK, "1")
    assert run_cli(load) == 2
    errors = capsys.readouterr().err
    assert "KeyError: 'of the library'" in errors and errors.splitlines()[-1] == "error: cannot be loaded"


def test_atomic_write_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.json"
    with atomic_write(target) as path:
        path.write_text("[1]")
        assert not target.exists() and path.parent == target.parent
    assert target.read_text() == "[1]"
    assert os.listdir(target.parent) == ["a.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for call in (check_writable, read_json, lambda path: atomic_folder(path).__enter__()):
        with pytest.raises(UserError) as raised:
            call(tmp_path / name)
        assert "\n" not in str(raised.value) and "\0" not in str(raised.value)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "file" / "a.json"):
        pass


def test_read_json_says_where_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"answers not found: .*a\.json"):
        read_json(path, "answers")
    path.write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(UserError, match="line 2 column 6"):
        read_json(path, "answers")
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 7\)"):
        read_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
    path.write_text("[1, 2]")
    assert read_json(path) == [1, 2]


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": true, "c": 0, "a": 1}}]', '{"a": NaN, "a": null}'])
def test_a_key_with_two_values_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"answers: key 'a' is there twice: .*a\.json"):
        read_json(path, "answers")
    path.write_text('{"a": [1], "b": 2, "a": [1]}')
    assert read_json(path) == {"a": [1], "b": 2}


def test_light_modules_import_no_heavy_package() -> None:
    """A command line that needs only these starts fast."""
    heavy = {"torch", "transformers", "huggingface_hub", "safetensors", "PIL"}
    code = f"import sys, llava, llava.errors, llava.files, llava.hub; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_link_stays_a_link_and_a_device_is_refused(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    with atomic_write(link) as path:
        path.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"
    for place in (tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="not a file"), atomic_write(place):
            raise AssertionError("nothing may be written")
    assert not Path("/dev/null").is_file()


def test_a_blob_of_the_hub_cache_is_not_written(tmp_path: Path) -> None:
    blob, links = tmp_path / "blobs" / "0a1b", [tmp_path / "snapshots" / name / "config.json" for name in ("1", "2")]
    blob.parent.mkdir()
    blob.write_text("old")
    for link in links:
        link.parent.mkdir(parents=True)
        link.symlink_to(blob)
    write_json(links[0], ["new"])
    assert read_json(links[0]) == ["new"] and not links[0].is_symlink()
    assert blob.read_text() == links[1].read_text() == "old"


def test_a_place_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write a file here"):
        check_writable(tmp_path / "file" / "report.json")
    check_writable(tmp_path / "new" / "report.json")
    assert not (tmp_path / "new" / "report.json").exists()

"""One run at a time in one folder, if the file system has locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eagle.locks import lock_folder
from llava.errors import UserError


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path / "new"),
        pytest.raises(UserError, match="another run is writing"),
        lock_folder(tmp_path / "new"),
    ):
        pass
    with lock_folder(tmp_path / "new"):
        pass


def test_a_second_run_is_refused_where_other_locks_are_reentrant(tmp_path: Path) -> None:
    """As in a process that has run lmms-eval's evaluator."""
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    evaluator._enable_reentrant_filelocks()
    with lock_folder(tmp_path), pytest.raises(UserError, match="another run is writing"), lock_folder(tmp_path):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom eagle.locks import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another run is writing"), lock_folder(tmp_path):
            pass
        run.send_signal(signal.SIGKILL)
    with lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with pytest.warns(UserWarning, match="without locks|flock not supported"), lock_folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here"), lock_folder(tmp_path / "file" / "new"):
        pass

"""One run in one folder, where the file system has locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from eagle.locks import take
from llava.errors import UserError


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with take(tmp_path / "new"), pytest.raises(UserError, match="another run is writing"):
        take(tmp_path / "new")
    take(tmp_path / "new").close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="without locks"):
        take(tmp_path).close()

"""The one error of bad input, and how a command line reports it.

A `UserError` says in one line what is wrong, where, and how to fix it. Any other exception that leaves a command is a
bug of the program. It is one line too, and with the environment variable `MSD_TRACEBACK` a traceback.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

USER_ERROR_STATUS = 2
BUG_STATUS = 1
TRACEBACK = "MSD_TRACEBACK"
"""Environment variable: unless empty, a command that fails prints tracebacks."""
INTERRUPT_STATUS = 130
PIPE_STATUS = 141
"""Of a program whose reader has left, as in ``msd bench | head``: what a shell gives for SIGPIPE."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter failed", "unexpected pos")
_MEMORY_TEXTS = ("DefaultCPUAllocator", "CUDA error: out of memory", "ALLOC_FAILED")
"""In messages of errors that have no class in torch: of the CPU, of CUDA outside its allocator, of cuBLAS and cuDNN."""
MAKE_ROOM = "free some space and start again; what was finished is kept"
LESS_MEMORY = "use 16 bit, a shorter prompt, a smaller batch or model; `msd doctor --base-model B` says what fits"


class UserError(Exception):
    """Bad input. `str()` is one line: `what: where (fix)`.

    Args:
        what: what is wrong.
        where: the file, option or value that is wrong.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, where: str | Path | None = None, fix: str | None = None) -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        line = self.what if self.where is None else f"{self.what}: {self.where}"
        if self.fix is not None:
            line = f"{line} ({self.fix})"
        # names of files may have lone surrogates, and what controls a terminal
        return "".join(
            each if each.isprintable() else each.encode("unicode_escape").decode() for each in " ".join(line.split())
        )


class OutOfMemory(UserError):
    """There is too little memory even for the smallest unit of work."""


def reason_of(error: BaseException, limit: int = 300) -> str:
    """What an error of a library says, in one line: its first line, and the next ones while a line ends with a colon.

    >>> reason_of(ValueError("field 'size':\\n  expected int\\nmore"))
    "field 'size': expected int"
    """
    words: list[str] = []
    for line in str(error).strip().splitlines():
        words += line.split()
        if words and not words[-1].endswith(":"):
            break
    text = " ".join(words) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def is_full_disk(error: BaseException) -> bool:
    """Whether ``error`` says that a disk is full, or a quota or a limit of a file's size is reached. The writers of
    torch and safetensors say so in words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(text in str(error) for text in _FULL_TEXTS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the CPU had no memory left for a tensor."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(part in str(error) for part in _MEMORY_TEXTS))
    )


def memory_message(error: BaseException) -> str | None:
    """The first sentences of the error, which say how much memory there is, without advice on environment variables."""
    sentences = re.split(r"(?<=\.)\s", str(error).strip())
    return " ".join(sentences[:3]) or None


@contextmanager
def cli_errors(resume: str | None = None) -> Iterator[None]:
    """Turns a `UserError`, a full disk or too little memory into one line on stderr and exit status 2, Ctrl-C into one
    line and status 130.

    Args:
        resume: what Ctrl-C leaves and how to resume, for that line.
    """
    try:
        yield
    except UserError as error:
        _give_up(error)
    except OSError as error:
        if not is_full_disk(error):
            raise
        _give_up(UserError(f"no room left to write ({error.strerror})", error.filename, MAKE_ROOM))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _give_up(UserError("out of memory", memory_message(error), LESS_MEMORY))
    except KeyboardInterrupt:
        print("stopped" if resume is None else f"stopped; {resume}", file=sys.stderr)
        raise SystemExit(INTERRUPT_STATUS) from None


def _give_up(error: UserError) -> NoReturn:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(USER_ERROR_STATUS) from None


def run_cli(main: Callable[[], int | None], resume: str | None = None) -> int:
    """Runs `main` and returns its exit status (None is 0); a `UserError` is printed and gives 2, Ctrl-C gives 130 (see
    `cli_errors` for ``resume``).

    Any other exception is a bug of the program: one line and status 1, or raised if `TRACEBACK` is set.
    If the reader of a pipe has left, the command ends quietly with `PIPE_STATUS`. A character that the terminal's
    encoding lacks is written as its number.

    Use as `sys.exit(run_cli(main))`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it
    status = _run(main, resume)
    return PIPE_STATUS if _reader_has_left() else status


def check_current_folder() -> None:
    """Raises `UserError` if the current folder was removed: libraries fail then when they are imported."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder was removed", fix="change to another folder") from None


def _reader_has_left() -> bool:
    """Whether nobody reads the pipe that stdout is. What cannot be written then goes to the null device."""
    if sys.stdout is None:  # closed by the caller
        return False
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(error, BrokenPipeError)
    return False


def _is_of_stdout(error: BaseException) -> bool:
    """Whether ``error`` is that of writing to a pipe without a reader, and that pipe is stdout."""
    if not isinstance(error, BrokenPipeError) or sys.stdout is None or not hasattr(select, "poll"):
        return False
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)  # errors are always reported
    except (OSError, ValueError):  # not a file
        return False
    return bool(pipe.poll(0))


def _run(main: Callable[[], int | None], resume: str | None) -> int:
    try:
        with cli_errors(resume):
            check_current_folder()
            status = main() or 0
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk is reported here
            return status
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # as rich ends a program
            return PIPE_STATUS
        if isinstance(stop.code, int):
            return stop.code
        if stop.code is not None:
            print(stop.code, file=sys.stderr)
        return 0 if stop.code is None else 1
    except Exception as error:
        if _is_of_stdout(error):
            return PIPE_STATUS
        if os.environ.get(TRACEBACK):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        bug = UserError(
            f"unexpected {type(error).__name__} in {Path(at.filename).name}, line {at.lineno}: {reason_of(error)}",
            fix=f"this is a bug; run again with {TRACEBACK}=1 and report the traceback",
        )
        print(f"error: {bug}", file=sys.stderr)
        return BUG_STATUS

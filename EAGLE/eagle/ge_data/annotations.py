"""Annotation files (a JSON array of rows) of any size, in bounded memory.

`iter_rows` reads a file once, a piece at a time; `RowFile` remembers only where each wanted row lies, for reading in
any order. Knows JSON, not conversations.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Callable, Iterator
from json.decoder import JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava.errors import UserError

CHUNK = 1 << 20
MAX_ROW = 1 << 26
"""Longest row in characters. A file whose quotes are broken would else be read whole, as one row."""

Row = dict[str, Any]
_SPACE = " \t\n\r"
_CUT_REACH = 12
"""An error this near to the end of the text may be the cut's fault: the longest atoms are `-Infinity` and a pair of
\\u."""


class PlacedRow(NamedTuple):
    """A row and where it lies in the file, in bytes."""

    start: int
    end: int
    value: Row


def iter_rows(path: Path, chunk: int = CHUNK) -> Iterator[PlacedRow]:
    """The rows of an annotation file, one after the other.

    Args:
        path: a JSON array of objects, UTF-8.
        chunk: bytes read at a time; memory holds a few of them, or the longest row.

    Raises:
        UserError: the file is missing, empty, no array of objects, or broken; with line, column and byte.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"annotation file cannot be read ({error.strerror})", path) from None
    with file:
        window = _Window(file, path, chunk)
        if window.peek() != "[":
            raise window.error("expected a JSON array of rows")
        window.advance(1)
        if window.peek() != "]":
            yield window.row()
            while window.peek() == ",":
                window.advance(1)
                yield window.row()
        if window.peek() != "]":
            raise window.error("expected ',' or ']' after a row")
        window.advance(1)
        if window.peek():
            raise window.error("unexpected text after the array")


class RowFile:
    """Rows of an annotation file in any order; in memory are only their places.

    Args:
        path: a JSON array of objects.
        keep: which rows are wanted; ``len`` and indices count these.

    ``numbers``: the number in the file of each kept row; ``total``: rows in the file.
    """

    def __init__(self, path: Path, keep: Callable[[Row], bool] = lambda row: True) -> None:
        self.path = path
        self.numbers, self._starts, self._ends = array("q"), array("q"), array("q")
        self.total = 0
        for number, row in enumerate(iter_rows(path)):
            self.total = number + 1
            if keep(row.value):
                self.numbers.append(number)
                self._starts.append(row.start)
                self._ends.append(row.end)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:
        start, end = self._starts[index], self._ends[index]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return json.loads(file.read(end - start))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"annotation file changed while it was read ({error})", self.path, "start again") from None


class _Window:
    """The text around the reading position; line, column and byte of that position."""

    def __init__(self, file: BinaryIO, path: Path, chunk: int) -> None:
        self._file, self._path, self._chunk = file, path, chunk
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = JSONDecoder().raw_decode
        self._text, self._pos, self._fed, self._ended = "", 0, 0, False
        self._line, self._column, self._byte = 1, 1, 0
        start = file.read(len(codecs.BOM_UTF8))
        file.seek(0)
        if start == codecs.BOM_UTF8:
            self._byte = len(start)

    def peek(self) -> str:
        """The next character that is no space, "" at the end; the position moves to it."""
        while True:
            end = self._pos
            while end < len(self._text) and self._text[end] in _SPACE:
                end += 1
            self.advance(end - self._pos)
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._fill():
                return ""

    def advance(self, count: int) -> None:
        """Moves the position by ``count`` characters of the text."""
        passed = self._text[self._pos : self._pos + count]
        self._pos += count
        self._byte += len(passed) if passed.isascii() else len(passed.encode())
        lines = passed.count("\n")
        self._line += lines
        self._column = count - passed.rfind("\n") if lines else self._column + count

    def row(self) -> PlacedRow:
        """Reads the object at the position and moves behind it."""
        if self.peek() != "{":
            raise self.error("expected a row (a JSON object)")
        while True:
            try:
                value, end = self._parse(self._text, self._pos)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._fill():
                    continue
                self.advance(error.pos - self._pos)
                raise self.error(error.msg) from None
            except RecursionError:
                raise self.error("row is nested too deep") from None
            except ValueError as error:  # a whole number of thousands of digits
                raise self.error(str(error)) from None
            start = self._byte
            self.advance(end - self._pos)
            return PlacedRow(start, self._byte, value)

    def error(self, message: str) -> UserError:
        """What is wrong at the position."""
        where = f"line {self._line} column {self._column}, byte {self._byte}"
        message = message if self._pos < len(self._text) else f"{message}, but the file ends"
        return UserError(f"annotation file is not valid ({message}, {where})", self._path)

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.pos >= len(self._text) - _CUT_REACH or error.msg.startswith("Unterminated string")

    def _fill(self) -> bool:
        """Drops what is behind the position and doubles what lies ahead; False at the end of the file."""
        ahead = len(self._text) - self._pos
        if self._ended:
            return False
        if ahead > MAX_ROW:
            raise self.error(f"row of more than {MAX_ROW} characters")
        data = self._file.read(max(self._chunk, ahead))
        self._fed += len(data)
        self._ended = not data
        try:
            text = self._decode(data, self._ended)
        except UnicodeDecodeError as error:
            byte = self._fed - len(error.object) + error.start
            raise UserError(f"annotation file is not UTF-8 text (byte {byte})", self._path) from None
        self._text, self._pos = self._text[self._pos :] + text, 0
        return True

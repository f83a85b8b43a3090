"""Annotation files (a JSON array of records) of any size, in bounded memory.

`iter_records` reads a file from start to end; `RecordFile` keeps only the place of each record and reads them in any
order. (ijson streams too, but does not say where a record lies in the file.)
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava.errors import UserError
from llava.files import unique_keys

CHUNK = 1 << 20
MAX_RECORD = 1 << 26
"""Characters of the longest record. Without it, a missing quote would make the rest of the file one record."""
CUT_REACH = 12
"""A parse error this close to the end of the text may come from the cut there: the longest tokens besides strings are
``-Infinity`` and a pair of ``\\uXXXX``."""

SPACES = re.compile(r"[ \t\n\r]*")

Record = dict[str, Any]


class PlacedRecord(NamedTuple):
    """A record and its place [start, end) in the file, in bytes."""

    start: int
    end: int
    value: Record


def iter_records(path: Path, chunk: int = CHUNK) -> Iterator[PlacedRecord]:
    """The records of an annotation file.

    Args:
        path: a JSON array of objects, UTF-8.
        chunk: bytes to read at once. Memory holds a few chunks, or the longest record.

    Raises:
        UserError: the file is missing, empty, not an array of objects, or damaged; with line, column and byte.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"annotation file cannot be read ({error.strerror})", path) from None
    with file:
        text = _Text(file, path, chunk)
        text.expect("[", "expected a JSON array of records")
        if text.peek() != "]":
            yield text.record()
            while text.peek() == ",":
                text.skip(1)
                yield text.record()
        text.expect("]", "expected ',' or ']' after a record")
        if text.peek():
            raise text.error("unexpected text after the array")


class RecordFile:
    """The records of an annotation file in any order. Memory holds only their places.

    Args:
        path: a JSON array of objects.
        keep: selects records; ``len`` and indices count only these.

    ``numbers``: the number in the file of each selected record; ``total``: number of records in the file.
    """

    def __init__(self, path: Path, keep: Callable[[Record], bool] = lambda record: True) -> None:
        self.path = path
        self.numbers, self._starts, self._ends = array("q"), array("q"), array("q")
        self.total = 0
        for number, record in enumerate(iter_records(path)):
            self.total = number + 1
            if keep(record.value):
                self.numbers.append(number)
                self._starts.append(record.start)
                self._ends.append(record.end)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        start, end = self._starts[index], self._ends[index]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return json.loads(file.read(end - start))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"annotation file changed while it was read ({error})", self.path, "start again") from None


class _Text:
    """A window of text that moves over a file. ``_byte``: place in the file of the first character that is not read."""

    def __init__(self, file: BinaryIO, path: Path, chunk: int) -> None:
        self._file, self._path, self._chunk = file, path, chunk
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._parse = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode
        self._text, self._position, self._byte = "", 0, 0
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            self._byte = len(codecs.BOM_UTF8)
        file.seek(self._byte)

    def peek(self) -> str:
        """Skips spaces and returns the next character; "" at the end."""
        while True:
            spaces = SPACES.match(self._text, self._position)
            assert spaces is not None
            self.skip(spaces.end() - self._position)
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def skip(self, count: int) -> None:
        """Moves over ``count`` characters."""
        end = self._position + count
        self._byte += len(self._text[self._position : end].encode())
        self._position = end

    def expect(self, character: str, message: str) -> None:
        """Moves over the next character, which must be this one."""
        if self.peek() != character:
            raise self.error(message)
        self.skip(1)

    def record(self) -> PlacedRecord:
        """Moves over the next record."""
        if self.peek() != "{":
            raise self.error("expected a record (a JSON object)")
        while True:
            try:
                value, end = self._parse(self._text, self._position)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self._text) - CUT_REACH or error.msg.startswith("Unterminated string")
                if near_end and self._read_more():
                    continue
                self.skip(error.pos - self._position)
                raise self.error(error.msg) from None
            except RecursionError:
                raise self.error("record is nested too deep") from None
            except ValueError as error:  # an integer of thousands of digits, or a key that is there twice
                raise self.error(str(error)) from None
            start = self._byte
            self.skip(end - self._position)
            return PlacedRecord(start, self._byte, value)

    def error(self, message: str) -> UserError:
        """The error at the present position."""
        line, column = 1, 1
        with self._path.open("rb") as file:
            left = self._byte
            while left and (data := file.read(min(left, CHUNK))):
                left -= len(data)
                lines = data.count(b"\n")
                line += lines
                text = data.rpartition(b"\n")[2].decode(errors="ignore").removeprefix("\ufeff")
                column = len(text) + (1 if lines else column)
        ending = "" if self._position < len(self._text) else ", but the file ends"
        where = f"line {line} column {column}, byte {self._byte}"
        return UserError(f"annotation file is not valid ({message}{ending}, {where})", self._path)

    def _read_more(self) -> bool:
        """Drops the text before the position and reads at least as much as is left; False at the end of the file."""
        left = self._text[self._position :]
        if len(left) > MAX_RECORD:
            raise self.error(f"record of more than {MAX_RECORD} characters")
        at = self._file.tell()
        pending = len(self._decoder.getstate()[0])
        data = self._file.read(max(self._chunk, len(left)))
        try:
            new = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            byte = at - pending + error.start
            raise UserError(f"annotation file is not UTF-8 text (byte {byte})", self._path) from None
        if data:
            self._text, self._position = left + new, 0
        return bool(data)

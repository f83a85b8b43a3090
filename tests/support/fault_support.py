"""Annotation rows, damage, malicious pickles and signals for tests. No pytest in here."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def text_rows(count: int, length: int = 1) -> list[dict[str, Any]]:
    """Rows of one question each; ``length`` makes the answers longer."""
    return [
        {
            "id": f"row{number}-{length}",
            "conversations": [
                {"from": "human", "value": "Name two rivers."},
                {"from": "gpt", "value": f"{number}: " + "the Nile is longer than the Rhine. " * length},
            ],
        }
        for number in range(count)
    ]


def damaged(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """``count`` damaged copies: in turn one bit is flipped, the end is cut off, and a block is overwritten by noise."""
    chance = random.Random(seed)
    for number in range(count):
        place = chance.randrange(len(data))
        if number % 3 == 0:
            yield data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        elif number % 3 == 1:
            yield data[:place]
        else:
            yield (data[:place] + chance.randbytes(16) + data[place + 16 :])[: len(data)]


def hear_ctrl_c() -> None:
    """For a process that is about to start: what a background shell starts is deaf to SIGINT, its children too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.folder),))

"""How far an allocation is: the index as shards come, a bar over all workers, the room on the disk, the summary."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table
from tqdm import tqdm

from eagle.conversations import REASONS
from eagle.hidden_states.index import Index, ShardInfo, gigabytes
from eagle.hidden_states.source import Source


class Board:
    """Keeps ``index.json`` up to date and shows how far the work is.

    Args:
        done: shards that are there and stay.
        rows, waiting: of the whole, and those of them that are to be made.
        source: of the shards that are there.
        notify: told once if the disk will not hold what is to come.
        replaced: bytes of shards that new ones will take the place of.
    """

    def __init__(
        self,
        folder: Path,
        done: Sequence[ShardInfo],
        rows: int,
        waiting: int,
        source: Source | None = None,
        notify: Callable[[str], None] = lambda line: None,
        replaced: int = 0,
    ) -> None:
        self.folder, self.shards, self._source = folder, list(done), source
        self.tokens, self._began, self._new_bytes, self._new_rows = 0, time.monotonic(), 0, 0
        self._waiting, self._notify, self._replaced, self._room_checked = waiting, notify, replaced, False
        slow = 0.1 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=rows, initial=rows - waiting, unit="sample", mininterval=slow, smoothing=0.05)

    def progress(self, rows: int, tokens: int) -> None:
        """Rows were read."""
        self.tokens += tokens
        per_second = self.tokens / max(time.monotonic() - self._began, 1e-9)
        disk = gigabytes(sum(shard.bytes for shard in self.shards))
        if self._new_rows:
            disk += f" of {gigabytes(sum(shard.bytes for shard in self.shards) + self._coming())}"
        self.bar.set_postfix_str(f"{per_second:.0f} tokens/s, {disk}", refresh=False)
        self.bar.update(rows)

    def shard(self, source: Source, info: ShardInfo) -> None:
        """A shard is on disk."""
        self.shards.append(info)
        self._new_bytes += info.bytes
        self._new_rows += info.end - info.start
        self._source = source.completed(self._source)
        Index.of(self._source, self.shards).save(self.folder)
        if not self._room_checked:
            self._room_checked = True
            self._check_room()

    def _coming(self) -> int:
        """Bytes that are still to be written, as far as the new shards tell."""
        return self._new_bytes * (self._waiting - self._new_rows) // self._new_rows

    def _check_room(self) -> None:
        coming, free = self._coming(), shutil.disk_usage(self.folder).free + self._replaced
        if coming > free:
            self._notify(
                f"the disk will be full before the end: {gigabytes(coming)} are still to come, {gigabytes(free)} are "
                "free (--hidden-dtype int8, --limit, or training with --online need less)"
            )


def summary(index: Index, folder: Path, seconds: float) -> Table:
    """What is in the folder now."""
    table = Table(title=str(folder), show_header=False)
    table.add_row("samples", f"{index.samples:,}")
    table.add_row("tokens", f"{index.tokens:,}")
    table.add_row("image tokens", f"{index.image_tokens:,}")
    table.add_row("shards", f"{len(index.shards):,}")
    table.add_row("disk", gigabytes(index.bytes))
    for reason, count in sorted(index.skipped.items()):
        table.add_row(f"skipped: {reason}", f"{count:,}  ({REASONS.get(reason, 'by another release')})")
    table.add_row("time of this run", f"{seconds:.1f} s")
    return table

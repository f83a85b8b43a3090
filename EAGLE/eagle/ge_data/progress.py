"""Progress bars, and the state of an allocation: its index, its bar, the space on the disk, and the summary."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eagle.conversations import REASONS
from eagle.hidden_states.index import Index, ShardInfo
from eagle.hidden_states.source import Source

CHECKSUM_DELAY = 2.0
"""Seconds before the bar of a check is shown."""


def progress_bar(label: str | None, unit: str, total: int | None = None, initial: int = 0, delay: float = 0.0) -> Any:
    """A bar with rate and time left, which is updated rarely if stderr is not a terminal.

    Args:
        unit: "B" for bytes, which are shown in kB, MB and so on.
        delay: seconds before it is shown.
    """
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=interval,
        smoothing=0.05,
        delay=delay,
    )


def checksum_bar(size: int) -> Any:
    """A bar over ``size`` bytes of shards that are read for their checksums."""
    return progress_bar("checksums", "B", size, delay=CHECKSUM_DELAY)


def format_bytes(size: float) -> str:
    """A number of bytes as text.

    >>> format_bytes(1_234_000_000), format_bytes(1_234_000), format_bytes(4_096)
    ('1.23 GB', '1.23 MB', '4.10 kB')
    """
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:.2f} {name}"


class AllocationProgress:
    """Keeps ``index.json`` up to date and shows the progress of all workers.

    Args:
        done: shards that exist and stay.
        records, waiting: number of records of the whole range, and of those that are still to be read.
        source: of the existing shards.
        notify: called once if the disk does not have the space for the rest.
        replaced: bytes of existing shards that new ones will replace.
    """

    def __init__(
        self,
        folder: Path,
        done: Sequence[ShardInfo],
        records: int,
        waiting: int,
        source: Source | None = None,
        notify: Callable[[str], None] = lambda line: None,
        replaced: int = 0,
    ) -> None:
        self.folder, self.shards, self._source = folder, list(done), source
        self.tokens, self._began, self._new_bytes, self._new_records = 0, time.monotonic(), 0, 0
        self._waiting, self._notify, self._replaced, self._space_checked = waiting, notify, replaced, False
        self.bar = progress_bar(None, "sample", records, initial=records - waiting)

    def update(self, records: int, tokens: int) -> None:
        """Records were read."""
        self.tokens += tokens
        per_second = self.tokens / max(time.monotonic() - self._began, 1e-9)
        written = sum(shard.bytes for shard in self.shards)
        disk = f", {format_bytes(written)}" if written else ""
        if self._new_records:
            disk += f" of {format_bytes(written + self._expected_bytes())}"
        self.bar.set_postfix_str(f"{per_second:.0f} tokens/s{disk}", refresh=False)
        self.bar.update(records)

    def add_shard(self, source: Source, info: ShardInfo) -> None:
        """A shard was written."""
        self.shards.append(info)
        self._new_bytes += info.bytes
        self._new_records += info.end - info.start
        self._source = source.completed(self._source)
        Index.of(self._source, self.shards).save(self.folder)
        if not self._space_checked:
            self._space_checked = True
            self._check_space()

    def _expected_bytes(self) -> int:
        """Estimated size of the shards that are still to be written, from the new shards."""
        return self._new_bytes * (self._waiting - self._new_records) // self._new_records

    def _check_space(self) -> None:
        expected, free = self._expected_bytes(), shutil.disk_usage(self.folder).free + self._replaced
        if expected > free:
            self._notify(
                f"the disk will be full before the end: {format_bytes(expected)} are still to come, "
                f"{format_bytes(free)} are free (--hidden-dtype int8, --limit, or training with --online need less)"
            )


def summary(index: Index, folder: Path, seconds: float) -> Any:
    """The content of the folder as a table."""
    from rich.table import Table

    table = Table(title=str(folder), show_header=False)
    table.add_row("samples", f"{index.samples:,}")
    table.add_row("tokens", f"{index.tokens:,}")
    table.add_row("image tokens", f"{index.image_tokens:,}")
    table.add_row("shards", f"{len(index.shards):,}")
    table.add_row("disk", format_bytes(index.bytes))
    for reason, count in sorted(index.skipped.items()):
        table.add_row(f"skipped: {reason}", f"{count:,}  ({REASONS.get(reason, 'by another release')})")
    table.add_row("time of this run", f"{seconds:.1f} s")
    return table

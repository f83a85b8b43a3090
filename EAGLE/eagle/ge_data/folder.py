"""The folder of a corpus while it is being made: one run at a time, one set of settings, nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from eagle.hidden_states.index import INDEX, PATTERN, Index, ShardInfo, Skipped, load_index, read_about, sha256
from eagle.hidden_states.validation import shown
from eagle.locks import lock_folder
from eagle.progress_bars import checking
from llava.errors import UserError
from llava.files import atomic_write, read_json

SETTINGS = "settings.json"
SKIPPED = "skipped.jsonl"
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """What decides the content of a corpus. Where pictures lie, which GPUs work and how large batches and shards are
    does not.

    ``data_sha256``: of the annotation file; ``rows``: length of the selection; ``hidden_dtype``: "int8", or "auto" for
    16 bit; ``regenerate``: answers are the target's own, and then ``msd_model`` the draft's name, ``temperature`` and
    ``max_new_tokens`` how they were made. A setting with a default is one that older folders do not name.
    """

    model_type: str
    dtype: str
    max_length: int
    seed: int
    data: str
    data_sha256: str
    rows: int
    hidden_dtype: str = AUTO
    regenerate: bool = False
    msd_model: str | None = None
    temperature: float = 0.0
    max_new_tokens: int | None = None

    def claim(self, folder: Path) -> None:
        """Writes ``settings.json``, or compares with the one that is there once there is a shard.

        Raises:
            UserError: the folder was begun with other settings, or holds shards without settings.
        """
        path, own, begun = folder / SETTINGS, asdict(self), any(folder.glob(PATTERN))
        if begun and path.exists():
            defaults = {item.name: item.default for item in fields(self) if item.default is not MISSING}
            found = read_json(path, "settings of the corpus")
            if not isinstance(found, dict):
                raise UserError("settings of the corpus are no JSON object", path, "take another --outdir")
            there = {**defaults, **found}
            changed = [
                f"{name} {shown(there.get(name))} instead of {value!r}"
                for name, value in own.items()
                if name != "data" and there.get(name) != value
            ]
            if changed:
                raise UserError(f"the folder was begun with {', '.join(changed)}", folder, "take another --outdir")
        elif begun:
            raise UserError(f"the folder has shards but no {SETTINGS}", folder, "take another --outdir")
        else:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; clears what a killed run left behind.

    Raises:
        UserError: another run writes here, or the folder cannot be made.
    """
    with lock_folder(folder):
        for stale in folder.glob(".*.tmp*"):
            stale.unlink(missing_ok=True)
        yield


def finished(folder: Path, notify: Callable[[str], None]) -> list[ShardInfo]:
    """The whole shards of a folder; none in a new one.

    Those that the index has no checksum of (a kill came between shard and index, or they were moved here) are read for
    one, and the index is written anew; ``notify`` is told before, for it takes its time.
    """
    if not (folder / INDEX).exists() and not any(folder.glob(PATTERN)):
        return []
    index = load_index(folder, strict=False)
    unread = [shard for shard in index.shards if shard.sha256 is None]
    if not unread:
        return list(index.shards)
    notify(f"reading {len(unread):,} shards for their checksums")
    sums = {}
    with checking(sum(shard.bytes for shard in unread)) as bar:
        for shard in unread:
            sums[shard.file] = sha256(folder / shard.file)
            bar.update(shard.bytes)
    shards = [replace(shard, sha256=shard.sha256 or sums[shard.file]) for shard in index.shards]
    Index.of(index.source, shards).save(folder)
    return shards


def missing(start: int, end: int, shard_size: int, done: Sequence[ShardInfo]) -> list[tuple[int, int]]:
    """The ranges of [start, end) that no shard answers for, cut at multiples of ``shard_size``.

    >>> missing(0, 10, 4, [])
    [(0, 4), (4, 8), (8, 10)]
    """
    gaps, at = [], start
    for shard in sorted(done, key=lambda shard: shard.start):
        gaps.append((at, min(shard.start, end)))
        at = max(at, shard.end)
    gaps.append((at, end))
    pieces = []
    for first, last in gaps:
        while first < last:
            cut = min(last, (first // shard_size + 1) * shard_size)
            pieces.append((first, cut))
            first = cut
    return pieces


def write_skipped(folder: Path, index: Index) -> None:
    """Writes ``skipped.jsonl`` (row, id, reason) from the shards."""
    with atomic_write(folder / SKIPPED) as temporary, temporary.open("w", encoding="utf-8") as file:
        for shard in index.shards:
            if shard.skipped:
                for row in read_about(folder / shard.file)["skipped"]:
                    file.write(json.dumps(asdict(Skipped(**row))) + "\n")

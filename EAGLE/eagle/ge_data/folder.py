"""The folder of a corpus while it is made: one run at a time, one set of settings, no shard made twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from eagle.ge_data.progress import checksum_bar
from eagle.hidden_states.index import INDEX, PATTERN, Index, ShardInfo, load_index, read_header, sha256
from eagle.locks import lock_folder
from llava.errors import UserError
from llava.files import atomic_write, read_json, write_json

SETTINGS = "settings.json"
SKIPPED = "skipped.jsonl"
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """The settings that decide the content of a corpus, unlike GPUs, batch size and the folder of pictures.

    ``data_sha256``: of the annotation file; ``rows``: number of selected records; ``hidden_dtype``: "int8", or "auto"
    for 16 bit; ``regenerate``: the target answers itself, with the draft ``msd_model``, ``temperature`` and
    ``max_new_tokens``; ``feature_layers``: whose streams are stored, as "2,18,33". Older folders lack the settings
    with a default.
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
    feature_layers: str | None = None

    def claim(self, folder: Path) -> None:
        """Writes ``settings.json``, or compares with it once there is a shard.

        Raises:
            UserError: the folder was begun with other settings, or has shards without settings.
        """
        path, own, begun = folder / SETTINGS, asdict(self), any(folder.glob(PATTERN))
        if not begun:
            write_json(path, own, indent=1)
            return
        if not path.exists():
            raise UserError(f"the folder has shards but no {SETTINGS}", folder, "take another --outdir")
        found = read_json(path, "settings of the corpus")
        if not isinstance(found, dict):
            raise UserError("settings of the corpus are not a JSON object", path, "take another --outdir")
        found = {**{item.name: item.default for item in fields(self) if item.default is not MISSING}, **found}
        changed = [
            f"{name} {found.get(name)!r:.60} instead of {value!r}"
            for name, value in own.items()
            if name != "data" and found.get(name) != value
        ]
        if changed:
            raise UserError(f"the folder was begun with {', '.join(changed)}", folder, "take another --outdir")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, locks it for this process, and deletes the temporary files of a killed run.

    Raises:
        UserError: another run writes here, or the folder cannot be made.
    """
    with lock_folder(folder):
        for stale in folder.glob(".*.tmp*"):
            stale.unlink(missing_ok=True)
        yield


def finished(folder: Path, notify: Callable[[str], None]) -> list[ShardInfo]:
    """The complete shards of a folder, with checksums.

    Shards without a checksum in the index (the run was killed between shard and index, or they were moved here) are
    read, which takes time: ``notify`` is called before.
    """
    if not (folder / INDEX).exists() and not any(folder.glob(PATTERN)):
        return []
    index = load_index(folder, strict=False)
    unread = [shard for shard in index.shards if shard.sha256 is None]
    if not unread:
        return list(index.shards)
    notify(f"reading {len(unread):,} shards for their checksums")
    sums = {}
    with checksum_bar(sum(shard.bytes for shard in unread)) as bar:
        for shard in unread:
            sums[shard.file] = sha256(folder / shard.file)
            bar.update(shard.bytes)
    shards = [replace(shard, sha256=shard.sha256 or sums[shard.file]) for shard in index.shards]
    Index.of(index.source, shards).save(folder)
    return shards


def missing(start: int, end: int, shard_size: int, done: Sequence[ShardInfo]) -> list[tuple[int, int]]:
    """The ranges of [start, end) that no shard covers, cut at multiples of ``shard_size``.

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
    """Writes ``skipped.jsonl`` (row, id, reason) from the headers of the shards."""
    with atomic_write(folder / SKIPPED) as temporary, temporary.open("w", encoding="utf-8") as file:
        for shard in index.shards:
            if shard.skipped:
                for record in read_header(folder / shard.file).skipped:
                    file.write(json.dumps(asdict(record)) + "\n")

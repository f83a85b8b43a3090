"""What a corpus holds: headers of its shards, and ``index.json`` that sums them up.

A shard says itself what it holds, so the index can always be made again from the shards. Knows nothing of tensors'
contents.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from eagle.hidden_states.source import SCHEMA, Source, check_schema, read_source
from eagle.hidden_states.validation import (
    Check,
    count,
    counts_by_name,
    list_of,
    matching,
    optional,
    record,
    text,
    wrong_fields,
)
from llava.errors import UserError
from llava.files import atomic_write, read_json

INDEX = "index.json"
PATTERN = "rows-*.safetensors"
AGAIN = "delete it and run the allocation again"
WITHOUT = "delete it, the shards suffice"

ABOUT: dict[str, Check] = {
    "schema": count,
    "source": lambda value: isinstance(value, Mapping),
    "start": count,
    "end": count,
    "samples": list_of(record({"row": count, "id": text})),
    "skipped": list_of(record({"row": count, "id": text, "reason": text})),
    "tokens": count,
    "image_tokens": count,
}
LISTED: dict[str, Check] = {
    "file": matching(r"rows-\d{8,}-\d{8,}\.safetensors"),
    "start": count,
    "end": count,
    "samples": count,
    "tokens": count,
    "image_tokens": count,
    "skipped": counts_by_name,
    "bytes": count,
    "sha256": optional(matching("[0-9a-f]{64}")),
}
BESIDE: dict[str, Check] = {
    "schema": count,
    "counts": lambda value: isinstance(value, Mapping),
    "shards": lambda value: isinstance(value, list),
}
"""Fields of ``index.json`` beside those of the source."""


@dataclass(frozen=True)
class Skipped:
    """A row of the annotation file (``row``: its number there) that could not be used."""

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class ShardInfo:
    """One shard in the index; ``skipped`` counts by reason; ``sha256`` is None until somebody has read the file for
    it."""

    file: str
    start: int
    end: int
    samples: int
    tokens: int
    image_tokens: int
    skipped: Mapping[str, int]
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Index(Source):
    """A corpus: its source and its shards, in the order of the shuffled selection."""

    shards: tuple[ShardInfo, ...] = ()

    @classmethod
    def of(cls, source: Source, shards: list[ShardInfo]) -> Index:
        """The index of ``shards`` in any order."""
        return cls(**_source_fields(source), shards=tuple(sorted(shards, key=lambda shard: shard.start)))

    @property
    def source(self) -> Source:
        return Source(**_source_fields(self))

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def image_tokens(self) -> int:
        return sum(shard.image_tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped rows by reason."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.skipped)
        return dict(total)

    @property
    def counts(self) -> dict[str, Any]:
        """The sums that ``index.json`` shows."""
        return {name: getattr(self, name) for name in ("samples", "tokens", "image_tokens", "skipped")}

    def save(self, folder: Path) -> None:
        """Writes ``index.json`` atomically."""
        value = {
            "schema": SCHEMA,
            **asdict(self.source),
            "counts": self.counts,
            "shards": [asdict(shard) for shard in self.shards],
        }
        with atomic_write(folder / INDEX) as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load_index(folder: str | Path, strict: bool = True) -> Index:
    """The index of a corpus: ``index.json``, completed by the shards that it does not list yet.

    Args:
        strict: a listed shard that is missing or has another size is an error; else it is left out, to be made again.

    Raises:
        UserError: no corpus here, a broken shard, another schema version, shards of different corpora.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no folder of shards", folder, "write it with python -m eagle.ge_data.allocation")
    files = {path.name: path for path in folder.glob(PATTERN)}
    source, listed = _read_index(folder / INDEX) if (folder / INDEX).exists() else (None, [])
    if source is None and not files:
        raise UserError("no shards in this folder", folder, "write them with python -m eagle.ge_data.allocation")
    shards = [shard for shard in listed if _is_whole(folder / shard.file, shard, strict)]
    for name in sorted(files.keys() - {shard.file for shard in listed}):
        about = read_about(files[name])
        found = source_in(about, files[name])
        if source is not None and (differences := found.differences(source)):
            raise UserError(
                f"shard of another corpus, with {differences}",
                files[name],
                "keep one folder for each model, data set and way of storing",
            )
        source = found.completed(source)
        shards.append(shard_info(files[name], about, None))
    assert source is not None
    index = Index.of(source, shards)
    for first, second in zip(index.shards, index.shards[1:], strict=False):
        if first.end > second.start:
            raise UserError("shards overlap", folder / second.file, f"one of it and {first.file} is too many")
    return index


def read_about(path: Path) -> dict[str, Any]:
    """The header of a shard: ``source``, range, ``samples`` (row, id), ``skipped`` (row, id, reason), numbers of
    tokens.

    Raises:
        UserError: the file is truncated, broken or no shard of ours, or its schema version is another.
    """
    with open_shard(path) as file:
        header = (file.metadata() or {}).get("msd")
    if header is None:
        raise UserError("not a shard of hidden states", path)
    try:
        about = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise UserError(f"header of the shard is broken ({error})", path, AGAIN) from None
    check_schema(about.get("schema") if isinstance(about, Mapping) else None, path)
    wrong = wrong_fields(about, ABOUT) or ("" if about["start"] < about["end"] else "an empty range")
    if wrong:
        raise UserError(f"header of the shard is incomplete or wrong ({wrong})", path, AGAIN)
    return about


def source_in(about: Mapping[str, Any], path: Path) -> Source:
    """The source in the header of the shard ``path``."""
    return read_source(about["source"], about["schema"], path, AGAIN)


def open_shard(path: Path) -> Any:
    """`safe_open` with a UserError for a file that is truncated, missing or of another kind."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"shard is truncated or broken ({error})", path, AGAIN) from None


def shard_info(path: Path, about: Mapping[str, Any], digest: str | None) -> ShardInfo:
    """A shard's entry in the index, from its header and checksum."""
    return ShardInfo(
        file=path.name,
        start=about["start"],
        end=about["end"],
        samples=len(about["samples"]),
        tokens=about["tokens"],
        image_tokens=about["image_tokens"],
        skipped=dict(Counter(row["reason"] for row in about["skipped"])),
        bytes=path.stat().st_size,
        sha256=digest,
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def gigabytes(size: float) -> str:
    """A size as text.

    >>> gigabytes(1_234_000_000)
    '1.23 GB'
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _source_fields(source: Source) -> dict[str, Any]:
    return {item.name: getattr(source, item.name) for item in fields(Source)}


def _read_index(path: Path) -> tuple[Source, list[ShardInfo]]:
    try:
        value = read_json(path, "index of the shards")
    except UserError as error:
        raise UserError(error.what, error.where, WITHOUT) from None
    if not isinstance(value, Mapping) or "schema" not in value:
        wrong = "no schema version"
        raise UserError(f"index of the shards is incomplete or wrong ({wrong})", path, WITHOUT)
    check_schema(value["schema"], path)
    own = {name: value[name] for name in value if name not in BESIDE}
    source = read_source(own, value["schema"], path, WITHOUT)
    wrong = wrong_fields({name: value[name] for name in value if name in BESIDE}, BESIDE)
    if not wrong:
        wrong = ", ".join(filter(None, (wrong_fields(shard, LISTED) for shard in value["shards"])))
    if wrong:
        raise UserError(f"index of the shards is incomplete or wrong ({wrong})", path, WITHOUT)
    shards = [ShardInfo(**shard) for shard in value["shards"]]
    if Index.of(source, shards).counts != value["counts"] or any(shard.start >= shard.end for shard in shards):
        raise UserError("index of the shards contradicts itself", path, WITHOUT)
    return source, shards


def _is_whole(path: Path, shard: ShardInfo, strict: bool) -> bool:
    size = path.stat().st_size if path.exists() else None
    if size == shard.bytes:
        return True
    if not strict:
        return False
    if size is None:
        raise UserError("shard is missing", path, "run the allocation again, it makes what is missing")
    raise UserError(f"shard is truncated or changed, {size} bytes instead of {shard.bytes}", path, AGAIN)

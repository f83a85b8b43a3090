"""The headers of shards, and ``index.json``, which sums them up.

The index can always be made again from the shards, since each shard has a complete header.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open

from eagle.hidden_states.source import SCHEMA, Source, check_schema, parse_source
from eagle.hidden_states.validation import STRICT, Count, Text, parse
from llava.errors import UserError
from llava.files import read_json, write_json

INDEX = "index.json"
PATTERN = "rows-*.safetensors"
MAKE_AGAIN = "delete it and run the allocation again"
DELETE_INDEX = "delete it, the shards suffice"


@dataclass(frozen=True)
class Skipped:
    """A record of the annotation file that could not be used. ``row``: its number in the file."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    row: Count
    id: Text
    reason: Text


@dataclass(frozen=True)
class StoredSample:
    """A record of the annotation file whose states are in a shard. ``row``: its number in the file."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    row: Count
    id: Text


@dataclass(frozen=True)
class ShardHeader:
    """The metadata of a shard, which covers the range [start, end) of the shuffled selection."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Count
    source: Source
    start: Count
    end: Count
    samples: list[StoredSample]
    skipped: list[Skipped]
    tokens: Count
    image_tokens: Count

    def info(self, path: Path, sha256: str | None) -> ShardInfo:
        """The entry of the shard in the index. ``path``: of the shard; ``sha256``: its checksum, if known."""
        reasons = dict(Counter(record.reason for record in self.skipped))
        sizes = (len(self.samples), self.tokens, self.image_tokens)
        return ShardInfo(path.name, self.start, self.end, *sizes, reasons, path.stat().st_size, sha256)


@dataclass(frozen=True)
class ShardInfo:
    """The entry of a shard in the index. ``samples``, ``tokens``, ``image_tokens``, ``bytes``: numbers of them;
    ``skipped``: number of records by reason; ``sha256``: None until somebody has read the file for it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    file: Annotated[str, Field(strict=True, pattern=r"^rows-\d{8,}-\d{8,}\.safetensors$")]
    start: Count
    end: Count
    samples: Count
    tokens: Count
    image_tokens: Count
    skipped: dict[Text, Count]
    bytes: Count
    sha256: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")] | None = None


@dataclass(frozen=True)
class Index(Source):
    """A corpus: its source and its shards, in the order of the shuffled selection."""

    shards: tuple[ShardInfo, ...] = ()

    @classmethod
    def of(cls, source: Source, shards: list[ShardInfo]) -> Index:
        """The index of ``shards``, given in any order."""
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
        """Number of skipped records by reason."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.skipped)
        return dict(total)

    @property
    def totals(self) -> dict[str, Any]:
        """The sums that ``index.json`` shows as ``counts``."""
        return {name: getattr(self, name) for name in ("samples", "tokens", "image_tokens", "skipped")}

    def save(self, folder: Path) -> None:
        """Writes ``index.json`` atomically."""
        shards = [asdict(shard) for shard in self.shards]
        value = {"schema": SCHEMA, **asdict(self.source), "counts": self.totals, "shards": shards}
        write_json(folder / INDEX, value, indent=1)


def load_index(folder: str | Path, strict: bool = True) -> Index:
    """The index of a corpus: ``index.json``, completed by the shards that it does not list yet.

    Args:
        strict: a listed shard that is missing or has another size is an error; otherwise it is left out.

    Raises:
        UserError: no corpus in this folder, a damaged shard, another schema version, or shards of different corpora.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no folder of shards", folder, "write it with python -m eagle.ge_data.allocation")
    files = {path.name: path for path in folder.glob(PATTERN)}
    source, listed = _read_index(folder / INDEX) if (folder / INDEX).exists() else (None, [])
    if source is None and not files:
        raise UserError("no shards in this folder", folder, "write them with python -m eagle.ge_data.allocation")
    shards = [shard for shard in listed if _is_complete(folder / shard.file, shard, strict)]
    for name in sorted(files.keys() - {shard.file for shard in listed}):
        header = read_header(files[name])
        if source is not None and (differences := header.source.differences(source)):
            fix = "keep one folder for each model, data set and way of storing"
            raise UserError(f"shard of another corpus, with {differences}", files[name], fix)
        source = header.source.completed(source)
        shards.append(header.info(files[name], None))
    assert source is not None
    index = Index.of(source, shards)
    for first, second in zip(index.shards, index.shards[1:], strict=False):
        if first.end > second.start:
            raise UserError("shards overlap", folder / second.file, f"delete it or {first.file}")
    return index


def read_header(path: Path) -> ShardHeader:
    """The header of a shard.

    Raises:
        UserError: the file is truncated, damaged, not a shard, or of a schema version that cannot be read.
    """
    what = "header of the shard"
    with open_shard(path) as file:
        text = (file.metadata() or {}).get("msd")
    if text is None:
        raise UserError("not a shard of hidden states", path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is damaged ({error})", path, MAKE_AGAIN) from None
    schema = check_schema(value, what, path, MAKE_AGAIN)
    source = parse_source(value.get("source"), schema, path, MAKE_AGAIN)
    header = parse(ShardHeader, {**value, "source": source}, what, path, MAKE_AGAIN)
    if header.start >= header.end:
        raise UserError(f"{what} is incomplete or wrong (an empty range)", path, MAKE_AGAIN)
    return header


def open_shard(path: Path) -> Any:
    """`safe_open`, with a UserError for a file that is truncated, missing or of another kind."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"shard is truncated or damaged ({error})", path, MAKE_AGAIN) from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _source_fields(source: Source) -> dict[str, Any]:
    return {item.name: getattr(source, item.name) for item in fields(Source)}


def _read_index(path: Path) -> tuple[Source, list[ShardInfo]]:
    what = "index of the shards"
    try:
        value = read_json(path, what)
    except UserError as error:
        raise UserError(error.what, error.where, DELETE_INDEX) from None
    schema = check_schema(value, what, path, DELETE_INDEX)
    shards, totals = value.get("shards"), value.get("counts")
    if not isinstance(shards, list) or not isinstance(totals, Mapping):
        raise UserError(f"{what} is incomplete or wrong (no counts or shards)", path, DELETE_INDEX)
    own = {name: value[name] for name in value.keys() - {"schema", "counts", "shards"}}
    source = parse_source(own, schema, path, DELETE_INDEX)
    listed = [parse(ShardInfo, shard, what, path, DELETE_INDEX) for shard in shards]
    if Index.of(source, listed).totals != totals or any(shard.start >= shard.end for shard in listed):
        raise UserError(f"{what} contradicts itself", path, DELETE_INDEX)
    return source, listed


def _is_complete(path: Path, shard: ShardInfo, strict: bool) -> bool:
    size = path.stat().st_size if path.exists() else None
    if size == shard.bytes:
        return True
    if not strict:
        return False
    if size is None:
        raise UserError("shard is missing", path, "run the allocation again, it makes what is missing")
    raise UserError(f"shard is truncated or changed, {size} bytes instead of {shard.bytes}", path, MAKE_AGAIN)

"""Writes a suite as a question file with its pictures: read once from where it is published, at a fixed commit.

    python -m eagle.questions fetch mmspec|vispec|seed [--subset testmini] [--out DIR]

DIR has ``questions.jsonl``, ``images/`` and ``suite.json`` (where each source is from). The question file appears when
everything is there; until then the command resumes where it stopped.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from tqdm import tqdm

from eagle.extras import require
from eagle.ge_data.download.transfer import fetch_bytes
from eagle.locks import lock_folder
from eagle.questions import read_questions
from eagle.questions.suites import (
    MMSPEC,
    MMSPEC_FOLDER,
    MMSPEC_LICENCE,
    MMSPEC_REVISION,
    SUBSETS,
    SUITES,
    HubSet,
    Suite,
)  # fmt: skip
from llava.arguments import OneLineParser
from llava.errors import UserError, reason_of, run_cli
from llava.files import atomic_write, read_object, unique_keys, write_json, write_text
from llava.hub import hub_errors
from llava.image import MAX_DOWNLOAD, load_image
from llava.strict import read_strict, strict_dataclass

GITHUB = "https://raw.githubusercontent.com"
QUESTIONS, RECORD, IMAGES = "questions.jsonl", "suite.json", "images"
Record = dict[str, Any]


@strict_dataclass
class Sample:
    """A line of MMSpec's file."""

    id: str
    image: str
    turns: tuple[str, ...]
    category: str
    topic: str


def default_folder(suite: str, subset: str) -> Path:
    """Where a suite is kept, in the folder of the hub's library."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "msd-suites" / f"{suite}-{subset}"


COPIES = "or clone the repository, and run python -m eagle.questions fetch with --copies"


def fetch(name: str, subset: str = "test", out: Path | None = None, copies: Path | None = None) -> Path:
    """The question file of a suite, which is written if it is not there.

    Args:
        out: its folder; by default `default_folder`.
        copies: a folder with copies of the repositories, ``owner/name``, to read in place of the hub and GitHub. They
            may have fewer rows.

    Raises:
        UserError: the folder has another suite, a set cannot be fetched, or has other rows or columns than published.
    """
    suite, folder = SUITES[name], out or default_folder(name, subset)
    path = folder / QUESTIONS
    about: Record = {"suite": name, "subset": subset, "sources": origins(suite)}
    with lock_folder(folder):
        if not is_complete(folder, about):
            print(f"fetching {name} ({subset}) into {folder}", flush=True)
            records = read_mmspec(subset, copies, folder) if suite.topics else read_sets(suite, subset, copies, folder)
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            counts = count_sources(map(json.loads, lines))
            check_counts(counts, suite, SUBSETS[subset], path if copies is None else None)
            write_text(path, "".join(f"{line}\n" for line in lines))
            write_json(folder / RECORD, {**about, "copies": copies is not None, "questions": counts}, indent=1)
    found = read_object(folder / RECORD, "record of a suite")
    for source, (place, licence) in about["sources"].items():
        print(f"{source}: {found['questions'].get(source, 0)} of {place}; licence: {licence}")
    if found["copies"]:
        print("read from copies, whose numbers of questions are not checked")
    return path


def origins(suite: Suite) -> dict[str, list[str]]:
    """Of each source its repository with the commit, and its licence."""
    if suite.topics:
        return {topic: [f"github.com/{MMSPEC}@{MMSPEC_REVISION}", MMSPEC_LICENCE] for topic in suite.topics}
    return {each.name: [f"{each.repository}@{each.revision}", each.licence] for each in suite.sets}


def is_complete(folder: Path, about: Record) -> bool:
    """Whether a folder has this suite already, with all its questions and pictures.

    Raises:
        UserError: it has another suite.
    """
    path = folder / RECORD
    if not path.exists() or not (folder / QUESTIONS).exists():
        return False
    found = read_object(path, "record of a suite")
    if any(found.get(key) != value for key, value in about.items()):
        raise UserError("the folder has another suite, subset or revision", path, "take another --out, or remove it")
    lines = (folder / QUESTIONS).read_text(encoding="utf-8").split("\n")
    try:
        read_questions(folder / QUESTIONS, turns=True)
    except UserError:  # a picture was removed since
        return False
    return count_sources(json.loads(line) for line in lines if line) == found["questions"]


def count_sources(records: Iterator[Record]) -> dict[str, int]:
    return dict(Counter(record["source"] for record in records))


def check_counts(counts: dict[str, int], suite: Suite, expected: int, where: Path | None) -> None:
    """Raises `UserError` for a source that the suite does not have, and, unless ``where`` is None, for another number
    of questions than ``expected``."""
    unknown = sorted(set(counts) - set(suite.sources))
    wrong = [f"{name} has {counts.get(name, 0)}" for name in suite.sources if counts.get(name, 0) != expected]
    if unknown or (wrong and where is not None):
        problem = f"unknown source {unknown[0]}" if unknown else f"{', '.join(wrong)} questions, not {expected}"
        raise UserError(problem, where, "the published set has changed")


def read_mmspec(subset: str, copies: Path | None, folder: Path) -> Iterator[Record]:
    """The samples of MMSpec, whose pictures are written into ``folder``.

    Raises:
        UserError: a file cannot be read, or a sample is damaged.
    """
    from huggingface_hub import constants

    place = f"{MMSPEC_FOLDER}/{subset}"
    if copies is None and constants.HF_HUB_OFFLINE:
        raise UserError("not here, and HF_HUB_OFFLINE is set", f"github.com/{MMSPEC}", f"unset it, {COPIES}")

    def get(name: str) -> bytes:
        if copies is None:
            try:
                return fetch_bytes(f"{GITHUB}/{MMSPEC}/{MMSPEC_REVISION}/{place}/{name}", MAX_DOWNLOAD)
            except UserError as error:
                raise UserError(error.what, error.where, COPIES) from None
        try:
            return (copies / MMSPEC / place / name).read_bytes()
        except OSError as error:
            raise UserError(f"no copy ({error.strerror})", copies / MMSPEC / place / name) from None

    lines = [line for line in get("mmspec.jsonl").decode().split("\n") if line.strip()]
    for number, line in enumerate(tqdm(lines, desc="mmspec", unit="sample", file=sys.stderr), start=1):
        where = f"{place}/mmspec.jsonl:{number}"
        try:
            given = json.loads(line, object_pairs_hook=unique_keys)
        except ValueError as error:
            raise UserError(f"not JSON ({error})", where) from None
        sample = read_strict(Sample, given, where)
        if ".." in Path(sample.image).parts or Path(sample.image).is_absolute():
            raise UserError(f"picture '{sample.image}' is outside the set", where)
        name = save_picture(folder, sample.image, partial(get, f"{IMAGES}/{sample.image}"))
        asked = {"turns": list(sample.turns)} if len(sample.turns) > 1 else {"question": "".join(sample.turns)}
        yield {"id": sample.id, "images": [name], **asked, "source": sample.topic, "kind": sample.category}


def read_sets(suite: Suite, subset: str, copies: Path | None, folder: Path) -> Iterator[Record]:
    """The questions of the sets of the hub, whose pictures are written into ``folder``. Of a larger set than the subset
    takes, the rows are spread evenly."""
    for each in suite.sets:
        with TemporaryDirectory(dir=folder) as cache:
            yield from read_set(each, SUBSETS[subset], copies, folder, cache)


def read_set(each: HubSet, count: int, copies: Path | None, folder: Path, cache: str) -> Iterator[Record]:
    """The questions of one set of the hub.

    Args:
        count: at most so many.
        cache: folder for what `datasets` writes.

    Raises:
        UserError: the set cannot be read, or has other rows than published.
    """
    rows = load_rows(each, each.files, copies, cache)
    if copies is None and len(rows) != each.rows:
        raise UserError(f"{each.name} has {len(rows)} rows, not {each.rows}", f"{each.repository}@{each.revision}")
    kept: Sequence[int] = range(len(rows))
    if each.only is not None:
        column, value = each.only
        kept = [place for place, found in enumerate(rows[column]) if found == value]
    places = [kept[number * len(kept) // count] for number in range(count)] if len(kept) > count else list(kept)
    chosen = rows.select(places).with_format("arrow")[:].to_pylist()  # pictures stay files, as they are
    pictures = {}
    if each.pictures is not None:
        for row in load_rows(each, each.pictures, copies, cache).with_format("arrow")[:].to_pylist():
            pictures[row["id"]] = row["image"]
    for place, row in zip(places, chosen, strict=True):
        where = f"{each.repository}, row {place}"
        shown = pictures.get(row.get("imageId")) if each.pictures is not None else row.get("image")
        (shown,) = shown if isinstance(shown, list) and len(shown) == 1 else [shown]
        if not isinstance(shown, dict) or not shown.get("bytes"):
            raise UserError("no picture", where)
        name = f"{each.name.lower().replace(' ', '-')}-{place:05d}"
        picture = save_picture(folder, name + suffix_of(shown["bytes"]), partial(bytes, shown["bytes"]))
        yield {"id": name, "images": [picture], "question": each.text(row), "source": each.name}


def suffix_of(data: bytes) -> str:
    """Of a picture file, by its content; none if it is not one."""
    try:
        return f".{Image.open(io.BytesIO(data)).format}".lower()
    except OSError:
        return ""


def load_rows(each: HubSet, pattern: str, copies: Path | None, cache: str) -> Any:
    """The rows of the files of a set, as `datasets.Dataset`.

    Raises:
        UserError: the package is not installed, or the files cannot be fetched or read.
    """
    require("datasets", extra="suites")
    from datasets import load_dataset

    if copies is None:
        from huggingface_hub import snapshot_download

        with hub_errors("data set", each.repository):
            found = snapshot_download(
                each.repository, repo_type="dataset", revision=each.revision, allow_patterns=[pattern]
            )
        source = Path(found)
    else:
        source = copies / each.repository
    files = sorted(map(str, source.glob(pattern)))
    if not files:
        raise UserError(f"no files {pattern}", source)
    try:
        return load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    except Exception as error:  # the library's errors have no common base class
        raise UserError(f"cannot be read ({reason_of(error)})", f"{source}/{pattern}") from error


def save_picture(folder: Path, name: str, get: Callable[[], bytes]) -> str:
    """Writes a picture unless it is there, and returns its name in the question file.

    Raises:
        UserError: it is not a picture.
    """
    path = folder / IMAGES / name
    if not path.exists():
        data = get()
        try:
            load_image(data)
        except UserError as error:
            raise UserError(error.what, name, error.fix) from None
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
    return f"{IMAGES}/{name}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m eagle.questions`; returns the exit status."""

    def run() -> int:
        parser = OneLineParser(prog="python -m eagle.questions", description=(__doc__ or "").splitlines()[0])
        parser.add_argument("action", choices=("fetch",))
        parser.add_argument("suite", choices=tuple(SUITES))
        parser.add_argument("--subset", choices=tuple(SUBSETS), default="test", help="default: %(default)s")
        parser.add_argument("--out", type=Path, metavar="DIR", help="default: below the cache of the hub's library")
        parser.add_argument(
            "--copies", type=Path, metavar="DIR", help="read copies of the repositories, DIR/owner/name, no network"
        )
        given = parser.parse_args(argv)
        print(fetch(given.suite, given.subset, given.out, given.copies))
        return 0

    return run_cli(run)

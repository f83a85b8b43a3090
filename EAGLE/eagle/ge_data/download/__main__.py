"""Fetch the training sets: the two annotation files and the pictures, laid out as the conversations name them.

    python -m eagle.ge_data.download --root image_data [--only coco,vg] [--check [--annotations FILE]]

Stopped at any moment and started again, it goes on. A set that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import sys
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

from eagle.arguments import positive
from eagle.ge_data.download.covers import LIST_FIX, LIST_PAGE, fetch_covers, missing_covers, read_addresses
from eagle.ge_data.download.fetch import fetch
from eagle.ge_data.download.inventory import report_needed, report_sets
from eagle.ge_data.download.picture_folder import expected_pictures, need_space, picture_names, remember_complete
from eagle.ge_data.download.unpack import unpack
from eagle.ge_data.folder import locked
from eagle.picture_sources import HUB, AnnotationFile, ArchiveSet, CoverSet, Source, choose
from llava.errors import OneLineParser, UserError, run_cli

ARCHIVES = "archives"
"""Folder in the root for archives until they are unpacked."""
END = 1 << 16
"""Bytes at either end of an annotation file that are looked at."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = OneLineParser(prog="python -m eagle.ge_data.download", description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--root", type=Path, default=Path("image_data"), help="folder of all sets (default: image_data)")
    add("--only", metavar="SET,...", help="only these: coco, gqa, ocr_vqa, textvqa, vg, annotations (default: all)")
    add("--check", action="store_true", help="download nothing, tell what is there; status 1 if something is missing")
    add("--annotations", type=Path, metavar="FILE", help="with --check: tell what this annotation file needs")
    add("--workers", type=positive, default=16, help="connections at a time for OCR-VQA's covers (default: 16)")
    add("--ocr-vqa-list", type=Path, metavar="FILE", help=f"OCR-VQA's dataset.json, if you have it ({LIST_PAGE})")
    add("--keep-archives", action="store_true", help=f"keep the archives in ROOT/{ARCHIVES}")
    add("--mirror", action="append", default=[], metavar="SET=URL", help="another address for a set; may be repeated")
    return made


def get_annotations(source: AnnotationFile, root: Path) -> str:
    """An annotation file, from the hub or from a mirror; returns what is to be told.

    Raises:
        UserError: it cannot be had.
        OSError: the disk.
    """
    path = root / source.path
    if path.exists():
        if not is_array(path):
            raise UserError(
                "not an annotation file, which is a JSON array", path, "delete it and run the command again"
            )
        return f"there already, {path}"
    if source.address.startswith(HUB):
        need_space(path.parent, source.size, path.name)
        _from_hub(source.address.removeprefix(HUB), path)
    else:
        fetch(source.address, path, source.name, lambda total, have: need_space(root, (total or 0) - have, path.name))
    if not is_array(path):
        path.unlink()
        raise UserError(
            "what came is no annotation file, which is a JSON array; it was deleted",
            source.address,
            "--mirror takes another address",
        )
    return str(path)


def is_array(path: Path) -> bool:
    """Whether a file begins and ends as a JSON array does; no page of a server that means something else will."""
    with path.open("rb") as file:
        first = file.read(END).removeprefix(BOM_UTF8).lstrip()[:1]
        file.seek(max(0, path.stat().st_size - END))
        return first == b"[" and file.read().rstrip()[-1:] == b"]"


def get_archive(source: ArchiveSet, root: Path, keep: bool) -> str:
    """A set that comes as an archive, downloaded and unpacked; returns what is to be told.

    Raises:
        UserError: it cannot be had, see `fetch` and `unpack`.
        OSError: the disk.
    """
    folder, archive = root / source.path, root / ARCHIVES / f"{source.name}.zip"
    there = len(picture_names(folder))
    if there >= expected_pictures(root, source):
        return f"there already, {there:,} pictures in {folder}"

    def check_room(total: int | None, have: int) -> None:
        size = total or source.size
        need_space(root, max(0, size - have) + size, f"archive and pictures of {source.name}")

    if not archive.exists():
        fetch(source.address, archive, source.name, check_room, source.md5)
    pictures = unpack(archive, folder, source.name)
    remember_complete(root, source, pictures)
    if not keep:
        archive.unlink()
    differs = "" if pictures == source.pictures else f" ({source.pictures:,} expected)"
    return f"{pictures:,} pictures{differs} in {folder}"


def get_covers(source: CoverSet, root: Path, list_file: Path | None, workers: int) -> str:
    """The set whose pictures are single files; returns what is to be told.

    Raises:
        UserError: the list of addresses cannot be had, or covers failed, see `fetch_covers`.
        OSError: the disk.
    """
    folder = root / source.path
    addresses = read_addresses(list_file) if list_file else _listed(source, folder.parent / "dataset.json")
    todo = len(missing_covers(addresses, folder))
    need_space(root, todo * (source.size // source.pictures), f"the covers of {source.name}")
    tally = fetch_covers(addresses, folder, workers)
    return f"{tally.there:,} pictures in {folder}, {tally.gone:,} gone from the web"


def _listed(source: CoverSet, path: Path) -> dict[str, str]:
    """The covers of the published list; what is downloaded and is no such list is not kept."""
    if path.exists():
        return read_addresses(path)
    try:
        fetch(source.address, path, source.name)
    except UserError as error:
        raise UserError(error.what, error.where, LIST_FIX) from None
    try:
        return read_addresses(path)
    except UserError:
        path.unlink()
        raise


def _from_hub(repository: str, path: Path) -> None:
    """A file of a hub data set; the hub's library tries again by itself and resumes its unfinished downloads."""
    try:
        hf_hub_download(repository, path.name, repo_type="dataset", local_dir=path.parent)
    except (RepositoryNotFoundError, RemoteEntryNotFoundError, HFValidationError) as error:
        raise UserError(f"the hub does not have {path.name} ({_first_line(error)})", repository) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"download of {path.name} from the hub failed ({_first_line(error)})",
            repository,
            "run the command again: what is done is kept",
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def get(source: Source, options: argparse.Namespace) -> str:
    """One set, whatever kind it is; returns what is to be told.

    Raises:
        UserError: it failed.
    """
    try:
        if isinstance(source, AnnotationFile):
            return get_annotations(source, options.root)
        if isinstance(source, ArchiveSet):
            return get_archive(source, options.root, options.keep_archives)
        assert isinstance(source, CoverSet)
        return get_covers(source, options.root, options.ocr_vqa_list, options.workers)
    except OSError as error:
        raise UserError(
            f"cannot write or read a file here ({error.strerror or error})",
            error.filename or options.root,
            "run the command again: what is done is kept",
        ) from None


def download(sources: Sequence[Source], options: argparse.Namespace) -> int:
    """Fetches the sets one after the other; returns the exit status.

    Raises:
        UserError: some of them failed. Each has had its own line then.
    """
    failed = []
    with locked(options.root):
        for source in sources:
            try:
                print(f"{source.name}: {get(source, options)}", flush=True)
            except UserError as error:
                failed.append(source.name)
                print(f"error: {source.name}: {error}", file=sys.stderr, flush=True)
        archives = options.root / ARCHIVES
        if archives.is_dir() and not any(archives.iterdir()):
            archives.rmdir()
    if failed:
        raise UserError(
            f"{len(failed)} of {len(sources)} sets failed",
            ", ".join(failed),
            "the lines above tell why; what is done is kept",
        )
    return 0


def check(sources: Sequence[Source], options: argparse.Namespace) -> int:
    """Prints what is there; returns 1 if something is missing, else 0."""
    if options.annotations is None:
        lines, whole = report_sets(options.root, sources)
    else:
        lines, whole = report_needed(options.root, sources, options.annotations, options.only is None)
    print("\n".join(lines))
    return 0 if whole else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status.

    Raises:
        UserError: bad options or input, or sets that failed.
    """
    options = parser().parse_args(argv)
    sources = choose(options.only, options.mirror)
    if options.check:
        return check(sources, options)
    if options.annotations is not None:
        raise UserError("--annotations is for --check", options.annotations)
    return download(sources, options)


if __name__ == "__main__":
    sys.exit(run_cli(main))

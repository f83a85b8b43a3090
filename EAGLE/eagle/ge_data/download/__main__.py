"""Download the training sets: the two annotation files and the pictures, in the folders that the conversations name.

    python -m eagle.ge_data.download --root image_data [--only coco,vg] [--check [--annotations FILE]]

The command can be stopped at any moment; started again, it resumes. A set that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import sys
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path

from eagle.arguments import positive
from eagle.ge_data.download.covers import LIST_FIX, LIST_PAGE, fetch_covers, missing_covers, read_addresses
from eagle.ge_data.download.inventory import (
    expected_pictures,
    need_space,
    picture_names,
    remember_complete,
    report_needed,
    report_sets,
)
from eagle.ge_data.download.transfer import AGAIN, MIRROR, fetch
from eagle.ge_data.download.unpack import unpack
from eagle.ge_data.folder import locked
from eagle.picture_sources import HUB, AnnotationFile, ArchiveSet, CoverSet, Source, choose
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli

ARCHIVES = "archives"
"""Folder in the root for archives until they are unpacked."""
END = 1 << 16
"""Number of bytes at both ends of an annotation file that are checked."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = OneLineParser(prog="python -m eagle.ge_data.download", description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--root", type=Path, default=Path("image_data"), help="folder of all sets (default: image_data)")
    add("--only", metavar="SET,...", help="only these: coco, gqa, ocr_vqa, textvqa, vg, annotations (default: all)")
    add("--check", action="store_true", help="download nothing, report what is there; status 1 if something is missing")
    add("--annotations", type=Path, metavar="FILE", help="with --check: report what this annotation file needs")
    add("--workers", type=positive, default=16, help="parallel connections for the OCR-VQA covers (default: 16)")
    add("--ocr-vqa-list", type=Path, metavar="FILE", help=f"OCR-VQA's dataset.json, if you have it ({LIST_PAGE})")
    add("--keep-archives", action="store_true", help=f"keep the archives in ROOT/{ARCHIVES}")
    add("--mirror", action="append", default=[], metavar="SET=URL", help="another address for a set; may be repeated")
    return made


def get(source: Source, options: argparse.Namespace) -> str:
    """Downloads one set; returns a line for the user.

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
        reason = f"cannot write or read a file here ({error.strerror or error})"
        raise UserError(reason, error.filename or options.root, AGAIN) from None


def get_annotations(source: AnnotationFile, root: Path) -> str:
    """Downloads an annotation file, from the hub or from a mirror."""
    path = root / source.path
    if path.exists():
        if not is_array(path):
            raise UserError("not an annotation file (a JSON array)", path, "delete it and run the command again")
        return f"already there, {path}"
    if source.address.startswith(HUB):
        need_space(path.parent, source.size, path.name)
        _from_hub(source.address.removeprefix(HUB), path)
    else:
        fetch(source.address, path, source.name, lambda size, have: need_space(root, (size or 0) - have, path.name))
    if not is_array(path):
        path.unlink()
        raise UserError("the server did not send an annotation file (a JSON array)", source.address, MIRROR)
    return str(path)


def is_array(path: Path) -> bool:
    """Whether a file begins and ends like a JSON array, unlike the page that a server sends instead of a file."""
    with path.open("rb") as file:
        first = file.read(END).removeprefix(BOM_UTF8).lstrip()[:1]
        file.seek(max(0, path.stat().st_size - END))
        return first == b"[" and file.read().rstrip()[-1:] == b"]"


def get_archive(source: ArchiveSet, root: Path, keep: bool) -> str:
    """Downloads and unpacks an archive. ``keep``: do not delete it afterwards."""
    folder, archive = root / source.path, root / ARCHIVES / f"{source.name}.zip"
    there = len(picture_names(folder))
    if there >= expected_pictures(root, source):
        return f"already there, {there:,} pictures in {folder}"

    def check_space(size: int | None, have: int) -> None:
        size = size or source.size
        need_space(root, max(0, size - have) + size, f"archive and pictures of {source.name}")

    if not archive.exists():
        fetch(source.address, archive, source.name, check_space, source.md5)
    pictures = unpack(archive, folder, source.name)
    remember_complete(root, source, pictures)
    if not keep:
        archive.unlink()
    differs = "" if pictures == source.pictures else f" ({source.pictures:,} expected)"
    return f"{pictures:,} pictures{differs} in {folder}"


def get_covers(source: CoverSet, root: Path, list_file: Path | None, workers: int) -> str:
    """Downloads the set whose pictures have an address each. ``list_file``: the user's own list of addresses."""
    folder = root / source.path
    path = list_file or folder.parent / "dataset.json"
    fetched = not list_file and not path.exists()
    if fetched:
        try:
            fetch(source.address, path, source.name)
        except UserError as error:
            raise UserError(error.what, error.where, LIST_FIX) from None
    try:
        addresses = read_addresses(path)
    except UserError:
        if fetched:
            path.unlink()
        raise
    need_space(root, len(missing_covers(addresses, folder)) * (source.size // source.pictures), "the covers of ocr_vqa")
    tally = fetch_covers(addresses, folder, workers)
    return f"{tally.saved:,} pictures in {folder}, {tally.gone:,} gone from the web"


def _from_hub(repository: str, path: Path) -> None:
    """A file of a data set on the hub. The hub's library retries and resumes by itself."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

    try:
        hf_hub_download(repository, path.name, repo_type="dataset", local_dir=path.parent)
    except (RepositoryNotFoundError, RemoteEntryNotFoundError, HFValidationError) as error:
        raise UserError(f"the hub does not have {path.name} ({_first_line(error)})", repository) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = f"download of {path.name} from the hub failed ({_first_line(error)})"
        raise UserError(reason, repository, AGAIN) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def download(sources: Sequence[Source], options: argparse.Namespace) -> None:
    """Downloads one set after the other.

    Raises:
        UserError: some sets failed; a line about each was printed.
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
        message = f"{len(failed)} of {len(sources)} sets failed"
        raise UserError(message, ", ".join(failed), f"see the lines above, then {AGAIN}: what is done is kept")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status.

    Raises:
        UserError: bad options or input, or sets that failed.
    """
    options = parser().parse_args(argv)
    sources = choose(options.only, options.mirror)
    if not options.check:
        if options.annotations is not None:
            raise UserError("--annotations needs --check", options.annotations)
        download(sources, options)
        return 0
    if options.annotations is None:
        lines, complete = report_sets(options.root, sources)
    else:
        lines, complete = report_needed(options.root, sources, options.annotations, options.only is None)
    print("\n".join(lines))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))

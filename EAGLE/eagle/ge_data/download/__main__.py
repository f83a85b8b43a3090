"""Download the training sets: the two annotation files and the pictures, in the folders that the conversations name.

    python -m eagle.ge_data.download --root image_data [--only coco,vg] [--check [--annotations FILE]]

The command can be stopped at any moment; started again, it resumes. A set that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from codecs import BOM_UTF8
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from eagle.arguments import positive
from eagle.ge_data.download.covers import LIST_FIX, LIST_PAGE, fetch_covers, missing_covers, read_addresses
from eagle.ge_data.download.inventory import count_pictures, report_needed, report_sets
from eagle.ge_data.download.sources import HUB, Source, choose
from eagle.ge_data.download.transfer import AGAIN, fetch, need_space
from eagle.ge_data.download.unpack import unpack
from eagle.ge_data.folder import locked
from llava.arguments import OneLineParser
from llava.errors import UserError, reason_of, run_cli

ARCHIVES = "archives"
"""Folder in the root for archives until they are unpacked."""
BLOCK = 1 << 16
"""Bytes that are read at once, and at both ends of an annotation file to recognize it."""


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


def get_annotations(source: Source, options: argparse.Namespace) -> str:
    """Downloads an annotation file, from the hub or from a mirror; returns a line for the user."""
    path = options.root / source.path
    if path.exists():
        check_array(path)
        return f"already there, {path}"
    if source.address.startswith(HUB):
        need_space(path.parent, source.size, path.name)
        _from_hub(source.address.removeprefix(HUB), path)
    else:
        fetch(source.address, path, path.name, verify=check_array)
    return str(path)


def check_array(path: Path) -> None:
    """Raises `UserError` unless a file begins and ends like a JSON array, unlike the page that a server may send."""
    with path.open("rb") as file:
        first = file.read(BLOCK).removeprefix(BOM_UTF8).lstrip()[:1]
        file.seek(max(0, path.stat().st_size - BLOCK))
        if first != b"[" or file.read().rstrip()[-1:] != b"]":
            raise UserError("not an annotation file (a JSON array)", path, f"delete it and {AGAIN}")


def _from_hub(repository: str, path: Path) -> None:
    """A file of a data set on the hub. The hub's library retries and resumes by itself."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(repository, path.name, repo_type="dataset", local_dir=path.parent)
    except Exception as error:  # errors of the HTTP library have no common base class
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"the hub did not give {path.name} ({reason_of(error)})", repository, AGAIN) from None


def get_archive(source: Source, options: argparse.Namespace) -> str:
    """Downloads and unpacks an archive; returns a line for the user."""
    folder, archive = options.root / source.path, options.root / ARCHIVES / f"{source.name}.zip"
    count = count_pictures(options.root, source)
    if not count.missing:
        return f"already there, {count.there:,} pictures in {folder}"
    if not archive.exists():
        fetch(source.address, archive, source.name, verify=partial(check_md5, expected=source.md5), space_factor=2)
    pictures = unpack(archive, folder, source.name)
    if not options.keep_archives:
        archive.unlink()
    differs = "" if pictures == source.pictures else f" ({source.pictures:,} expected)"
    return f"{pictures:,} pictures{differs} in {folder}"


def check_md5(path: Path, expected: str | None) -> None:
    """Raises `UserError` if a file has another checksum; None is not checked."""
    if expected is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise UserError(f"checksum (MD5) is {digest.hexdigest()}, not {expected}", path)


def get_covers(source: Source, options: argparse.Namespace) -> str:
    """Downloads the set whose pictures have an address each; returns a line for the user."""
    folder = options.root / source.path
    path = options.ocr_vqa_list or folder.parent / "dataset.json"
    try:
        if not options.ocr_vqa_list and not path.exists():
            fetch(source.address, path, source.name, verify=read_addresses)
        addresses = read_addresses(path)
    except UserError as error:
        raise UserError(error.what, error.where, LIST_FIX) from None
    size = len(missing_covers(addresses, folder)) * (source.size // source.pictures)
    need_space(options.root, size, "the covers of ocr_vqa")
    fetch_covers(addresses, folder, options.workers)
    count = count_pictures(options.root, source)
    return f"{count.there:,} pictures in {folder}, {count.gone:,} gone from the web"


GET = {"annotations": get_annotations, "archive": get_archive, "covers": get_covers}
"""How each kind of set is downloaded."""


def download(sources: Sequence[Source], options: argparse.Namespace) -> None:
    """Downloads one set after the other.

    Raises:
        UserError: some sets failed; a line about each was printed.
    """
    failed = []
    with locked(options.root):
        for source in sources:
            try:
                print(f"{source.name}: {GET[source.kind](source, options)}", flush=True)
            except (UserError, OSError) as error:
                if isinstance(error, OSError):
                    reason = f"cannot write or read a file here ({error.strerror or error})"
                    error = UserError(reason, error.filename or options.root, AGAIN)
                failed.append(source.name)
                print(f"error: {source.name}: {error}", file=sys.stderr, flush=True)
        with suppress(OSError):  # of a folder that is not empty, or not there
            (options.root / ARCHIVES).rmdir()
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
    sys.exit(run_cli(main, "what was fetched is kept, and the same command resumes"))

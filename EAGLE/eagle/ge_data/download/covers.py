"""The book covers of OCR-VQA: some 200 000 pictures, each at an address of its own, many of them gone.

The list of addresses is OCR-VQA's ``dataset.json``: an object of ``{NAME: {"imageURL": ADDRESS, ...}}``. A cover is
saved as ``NAME.jpg``, as the conversations name it, and turned into a JPEG where it is none.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Generator, Mapping
from contextlib import closing
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from eagle.ge_data.download.fetch import Gone, Refused, fetch_bytes
from eagle.ge_data.download.picture_folder import gone_covers, picture_names, remember_gone
from eagle.progress_bars import progress_bar
from llava.errors import UserError
from llava.files import read_json

MAX_COVER = 1 << 25
"""Bytes; no cover is that large."""
QUALITY = 95
HOPELESS = 100
"""So many covers in a row without an answer that makes sense end the set: the fault is not the covers'."""
CONTROLS = 10
"""So many covers that are there are asked for again, to see whose fault it is; more than half of them have to come."""
LIST_PAGE = "https://ocr-vqa.github.io"
LIST_FIX = f"get dataset.json from {LIST_PAGE} and give it as --ocr-vqa-list"
Outcome = tuple[str, UserError | None]
"""Name of a cover, and why it is not there."""
_NAME = re.compile(r"\w[\w.-]*")


class Tally(NamedTuple):
    """What became of the covers of a list."""

    there: int
    gone: int


def read_addresses(path: Path) -> dict[str, str]:
    """Name and address of each cover.

    Raises:
        UserError: the file is not OCR-VQA's list, or a name in it is no plain file name.
    """
    try:
        entries = read_json(path, "list of OCR-VQA covers")
    except UserError as error:
        raise UserError(error.what, error.where, LIST_FIX) from None
    if not isinstance(entries, dict) or not entries:
        raise UserError("not the list of OCR-VQA covers", path, LIST_FIX)
    addresses = {}
    for name, entry in entries.items():
        address = entry.get("imageURL") if isinstance(entry, dict) else None
        if not isinstance(address, str):
            raise UserError(f"list of OCR-VQA covers has no imageURL for '{name}'", path, LIST_FIX)
        if not _NAME.fullmatch(name):
            raise UserError(f"list of OCR-VQA covers has a name that is no file name, '{name}'", path, LIST_FIX)
        addresses[name] = address
    return addresses


def missing_covers(addresses: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The covers that are neither there nor known to be gone from their address."""
    there, gone = picture_names(folder), gone_covers(folder)
    return {n: a for n, a in addresses.items() if f"{n}.jpg" not in there and gone.get(n) != a}


def fetch_covers(addresses: Mapping[str, str], folder: Path, workers: int) -> Tally:
    """Downloads the covers that are missing, several at a time. What is gone is written to ``gone.txt``.

    A cover that is refused, or has something else in its place, counts as gone once the run is over, and if at least as
    many others came in it: else a proxy's page for everything would be taken for all of them.

    Raises:
        UserError: covers failed that may be there (all others have been fetched), or none succeeds any more.
        OSError: the disk.
    """
    todo, there = missing_covers(addresses, folder), picture_names(folder)
    before = {name: address for name, address in addresses.items() if f"{name}.jpg" in there}
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, UserError] = {}
    refused: dict[str, Refused] = {}
    in_a_row = gone = came = 0
    with (
        progress_bar("ocr_vqa", " covers", len(todo)) as bar,
        closing(_outcomes(todo, folder, workers)) as outcomes,
    ):
        for name, error in outcomes:
            in_a_row = in_a_row + 1 if error and not isinstance(error, Gone) else 0
            came += error is None
            if isinstance(error, Gone):
                gone += 1
                remember_gone(folder, name, todo[name], error.what)
            elif isinstance(error, Refused):
                refused[name] = error
            elif error:
                failed[name] = error
            bar.set_postfix_str(f"{gone} gone, {len(failed) + len(refused)} failed", refresh=False)
            bar.update(1)
            if in_a_row == HOPELESS:
                again = come_again(before, workers, CONTROLS) if isinstance(error, Refused) else 0
                if again <= CONTROLS // 2:
                    raise UserError(
                        f"the last {HOPELESS} covers all failed, {name}: {error}", folder, "see the network"
                    )
                in_a_row = 0
    if came < len(refused):
        came += come_again(before, workers, len(refused) - came)
    if came < len(refused):
        failed = {**refused, **failed}
    else:
        for name, error in refused.items():
            remember_gone(folder, name, todo[name], error.what)
    if failed:
        name, first = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(todo)} covers failed, the first {name}: {first}",
            fix="run the command again: what is done is kept",
        )
    return Tally(len(picture_names(folder)), len(gone_covers(folder)))


def come_again(covers: Mapping[str, str], workers: int, count: int) -> int:
    """Asks again for ``count`` of covers that have come before and returns how many come: what else is refused then is
    refused for itself. Nothing is saved."""
    chosen = dict(random.sample(sorted(covers.items()), min(count, len(covers))))
    came = 0
    with progress_bar("ocr_vqa, asked again", " covers", len(chosen)) as bar:
        for _, error in _outcomes(chosen, None, workers):
            came += error is None
            bar.update(1)
    return came


def _outcomes(todo: Mapping[str, str], folder: Path | None, workers: int) -> Generator[Outcome, None, None]:
    """What became of each cover, as soon as it is known. ``folder``: where it is saved; None for nowhere."""

    def work(cover: tuple[str, str]) -> Outcome:
        name, address = cover
        try:
            data = as_cover(fetch_bytes(address, MAX_COVER), address)
        except UserError as error:
            return name, error
        if folder is not None:
            save_cover(data, folder / f"{name}.jpg")
        return name, None

    with ThreadPool(workers) as pool:
        yield from pool.imap_unordered(work, todo.items())


def as_cover(data: bytes, address: str) -> bytes:
    """A picture as JPEG: as it is if it is one, else converted, on white where it is transparent.

    Raises:
        Gone: the picture is a single pixel, which book shops send for a cover they do not have.
        Refused: it cannot be read as a picture.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            if max(image.size) == 1:
                raise Gone("the server has only a placeholder", address)
            return data if image.format == "JPEG" else _as_jpeg(image)
    except UnidentifiedImageError:
        raise Refused("what the server sent is no picture", address) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(f"not a whole picture ({error})", address) from None


def save_cover(data: bytes, path: Path) -> None:
    """Writes a cover, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def _as_jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()

"""The book covers of OCR-VQA: about 200 000 pictures, each with its own address, many of them gone.

The list of addresses is OCR-VQA's ``dataset.json``: ``{NAME: {"imageURL": ADDRESS, ...}}``. A cover is saved as
``NAME.jpg``, as the conversations name it, and converted to JPEG if it has another format.
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

from eagle.ge_data.download.inventory import gone_covers, picture_names, remember_gone
from eagle.ge_data.download.transfer import AGAIN, Gone, Refused, fetch_bytes
from eagle.ge_data.progress import progress_bar
from llava.errors import UserError
from llava.files import read_json

MAX_BYTES = 1 << 25
"""No cover is larger."""
QUALITY = 95
MAX_FAILURES_IN_A_ROW = 100
CONTROLS = 10
"""Number of saved covers that are requested again to see whether the network works."""
LIST_PAGE = "https://ocr-vqa.github.io"
LIST_FIX = f"get dataset.json from {LIST_PAGE} and give it as --ocr-vqa-list"
Result = tuple[str, UserError | None]
"""Name of a cover, and why it could not be saved."""


class Tally(NamedTuple):
    """Number of covers that are saved and that are gone."""

    saved: int
    gone: int


def read_addresses(path: Path) -> dict[str, str]:
    """Name and address of each cover.

    Raises:
        UserError: the file is not OCR-VQA's list, or a name in it is not a plain file name.
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
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"list of OCR-VQA covers has '{name}', which is not a file name", path, LIST_FIX)
        addresses[name] = address
    return addresses


def missing_covers(addresses: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The covers that are neither saved nor known to be gone from their address."""
    saved, gone = picture_names(folder), gone_covers(folder)
    return {n: a for n, a in addresses.items() if f"{n}.jpg" not in saved and gone.get(n) != a}


def fetch_covers(addresses: Mapping[str, str], folder: Path, workers: int) -> Tally:
    """Downloads the missing covers over ``workers`` connections. Those that are gone are listed in ``gone.txt``.

    A cover that is refused, or replaced by something else, also counts as gone, but only at the end of a run that shows
    that the network works: as many others arrived, or covers that are saved can still be had. Otherwise the login page
    of a proxy would be taken for the answer of every shop.

    Raises:
        UserError: some covers failed (all others are saved), or `MAX_FAILURES_IN_A_ROW` failed.
        OSError: the disk is full or fails.
    """
    todo, names = missing_covers(addresses, folder), picture_names(folder)
    saved = {name: address for name, address in addresses.items() if f"{name}.jpg" in names}
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, UserError] = {}
    refused: dict[str, UserError] = {}
    new = in_a_row = 0
    with progress_bar("ocr_vqa", " covers", len(todo)) as bar, closing(_results(todo, folder, workers)) as results:
        for name, error in results:
            bar.update(1)
            in_a_row = 0 if error is None or isinstance(error, Gone) else in_a_row + 1
            if error is None:
                new += 1
            elif isinstance(error, Gone):
                remember_gone(folder, name, todo[name], error.what)
            else:
                (refused if isinstance(error, Refused) else failed)[name] = error
            if in_a_row == MAX_FAILURES_IN_A_ROW:
                if not (isinstance(error, Refused) and _network_works(saved, workers)):
                    raise UserError(f"{in_a_row} covers in a row failed, {name}: {error}", folder, "check the network")
                in_a_row = 0
    if new >= len(refused) or _network_works(saved, workers):
        for name, error in refused.items():
            remember_gone(folder, name, todo[name], error.what)
    else:
        failed = {**refused, **failed}
    if failed:
        name, first = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(todo)} covers failed, the first {name}: {first}", fix=AGAIN)
    return Tally(len(picture_names(folder)), len(gone_covers(folder)))


def _network_works(saved: Mapping[str, str], workers: int) -> bool:
    """Whether more than half of `CONTROLS` covers that were saved before can be downloaded again."""
    controls = dict(random.sample(sorted(saved.items()), min(CONTROLS, len(saved))))
    return 2 * sum(error is None for _, error in _results(controls, None, workers)) > len(controls)


def _results(todo: Mapping[str, str], folder: Path | None, workers: int) -> Generator[Result, None, None]:
    """Downloads covers and yields each result when it is known. ``folder``: None does not save them."""

    def work(cover: tuple[str, str]) -> Result:
        name, address = cover
        try:
            data = as_jpeg(fetch_bytes(address, MAX_BYTES), address)
        except UserError as error:
            return name, error
        if folder is not None:
            save_cover(data, folder / f"{name}.jpg")
        return name, None

    with ThreadPool(workers) as pool:
        yield from pool.imap_unordered(work, todo.items())


def as_jpeg(data: bytes, address: str) -> bytes:
    """A picture as JPEG: unchanged if it is one, otherwise converted, with white for transparent pixels.

    Raises:
        Gone: it is a single pixel, which shops send for a cover that they do not have.
        Refused: it cannot be read as a picture.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            if max(image.size) == 1:
                raise Gone("the server has only a placeholder", address)
            if image.format == "JPEG":
                return data
            converted: Image.Image = image
            if "A" in image.getbands() or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                converted = Image.alpha_composite(white, image.convert("RGBA"))
            buffer = BytesIO()
            converted.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
            return buffer.getvalue()
    except UnidentifiedImageError:
        raise Refused("the server did not send a picture", address) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(f"not a complete picture ({error})", address) from None


def save_cover(data: bytes, path: Path) -> None:
    """Writes a cover atomically."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)

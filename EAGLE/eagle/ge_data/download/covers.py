"""The book covers of OCR-VQA: about 200 000 pictures, each with its own address, many of them gone.

The list of addresses is OCR-VQA's ``dataset.json``: ``{NAME: {"imageURL": ADDRESS, ...}}``. A cover is saved as
``NAME.jpg``, as the conversations name it, and converted to JPEG if it has another format.
"""

from __future__ import annotations

import random
import re
from collections.abc import Generator, Mapping
from contextlib import closing
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from eagle.ge_data.download.inventory import gone_covers, picture_names, remember_gone
from eagle.ge_data.download.transfer import AGAIN, Refused, fetch_bytes
from eagle.ge_data.progress import progress_bar
from llava.errors import UserError
from llava.files import atomic_write, read_object

MAX_BYTES = 1 << 25
"""No cover is larger."""
QUALITY = 95
BATCH = 100
"""Failures after which the network is checked."""
CONTROLS = 10
"""Number of saved covers that are requested again to see whether the network works."""
LIST_PAGE = "https://ocr-vqa.github.io"
LIST_FIX = f"get dataset.json from {LIST_PAGE} and give it as --ocr-vqa-list"


def read_addresses(path: Path) -> dict[str, str]:
    """Name and address of each cover.

    Raises:
        UserError: the file is not OCR-VQA's list, or a name in it is not a plain file name.
    """
    addresses = {}
    for name, entry in read_object(path, "list of OCR-VQA covers").items():
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


def fetch_covers(addresses: Mapping[str, str], folder: Path, workers: int) -> None:
    """Downloads the missing covers over ``workers`` connections. Those that are gone are listed in ``gone.txt``.

    A cover is gone if its server refuses it or sends something else, while covers that are saved can still be
    downloaded. Without that check the login page of a proxy would be taken for the answer of every shop.

    Raises:
        UserError: some covers failed (all others are saved), or the network does not work.
        OSError: the disk fails.
    """
    todo = missing_covers(addresses, folder)
    unsettled: dict[str, UserError] = {}
    failed: dict[str, UserError] = {}

    def settle() -> None:
        if unsettled and not _network_works(addresses, folder, workers):
            name, error = next(iter(unsettled.items()))
            message = f"{len(unsettled)} covers failed and no other can be downloaded, {name}: {error}"
            raise UserError(message, folder, "check the network")
        for name, error in unsettled.items():
            if isinstance(error, Refused):
                remember_gone(folder, name, todo[name], error.what)
            else:
                failed[name] = error
        unsettled.clear()

    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar("ocr_vqa", " covers", len(todo)) as bar, closing(_downloads(todo, workers)) as downloads:
        for name, cover in downloads:
            bar.update(1)
            if isinstance(cover, bytes):
                with atomic_write(folder / f"{name}.jpg") as temporary:
                    temporary.write_bytes(cover)
            else:
                unsettled[name] = cover
            if len(unsettled) == BATCH:
                settle()
    settle()
    if failed:
        name, error = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(todo)} covers failed, the first {name}: {error}", fix=AGAIN)


def _network_works(addresses: Mapping[str, str], folder: Path, workers: int) -> bool:
    """Whether more than half of `CONTROLS` covers that are saved can be downloaded again."""
    saved = sorted(name for name in addresses if f"{name}.jpg" in picture_names(folder))
    controls = {name: addresses[name] for name in random.sample(saved, min(CONTROLS, len(saved)))}
    return 2 * sum(isinstance(cover, bytes) for _, cover in _downloads(controls, workers)) > len(controls)


def _downloads(addresses: Mapping[str, str], workers: int) -> Generator[tuple[str, bytes | UserError], None, None]:
    """Yields each cover as JPEG, or why it cannot be downloaded, as soon as that is known."""

    def download(item: tuple[str, str]) -> tuple[str, bytes | UserError]:
        name, address = item
        try:
            return name, as_jpeg(fetch_bytes(address, MAX_BYTES), address)
        except UserError as error:
            return name, error

    with ThreadPool(workers) as pool:
        yield from pool.imap_unordered(download, addresses.items())


def as_jpeg(data: bytes, address: str) -> bytes:
    """A picture as JPEG: unchanged if it is one, otherwise converted, with white for transparent pixels.

    Raises:
        Refused: it is not a complete picture, or a single pixel, which shops send for a cover that they do not have.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            if max(image.size) == 1:
                raise Refused("the server has only a placeholder", address)
            if image.format == "JPEG":
                return data
            opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            buffer = BytesIO()
            opaque.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
            return buffer.getvalue()
    except UnidentifiedImageError:
        raise Refused("the server did not send a picture", address) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(f"not a complete picture ({error})", address) from None

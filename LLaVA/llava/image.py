"""Pictures: reading them safely, and LLaVA's padding to a square."""

from __future__ import annotations

import base64
import io
import mimetypes
import os
import struct
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from .errors import UserError, reason_of

MAX_SQUARE_SIDE = 16384
"""Longest side in pixels of a picture that is made square: 0.8 GB of RGB. A 1 x 60000 picture is a bomb once padded."""

ImageInput = Any
"""A path, a URL (``http(s):``, ``file:``, ``data:``), bytes, an open file, a PIL picture, or an array: numpy or torch,
[H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4; bool, whole numbers from 0 to 255, or floats from 0 to 1."""
MAX_DOWNLOAD = 64 * 2**20
"""Bytes of a picture that a URL may give."""
TIMEOUT = 30.0
"""Seconds that a server may take for a part of a picture."""
DOWNLOAD_SECONDS = 120.0
"""Seconds that it may take for a picture."""
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Grey pictures of more than 8 bit."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF orientation."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each pass of an interlaced PNG, and the distance of its columns and rows."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Values of a pixel, by the colour type of a PNG."""
PART = 2**20
"""Bytes of a PNG that are unpacked at a time."""


def data_url(path: Path) -> str:
    """A picture's file as a ``data:`` URL."""
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


class PictureUnreachable(UserError):
    """The file system or the network, not the picture, is the cause."""


def load_image(
    source: ImageInput,
    *,
    formats: Sequence[str] | None = None,
    max_side: int | None = None,
    channels: Literal["channels_first", "channels_last"] | None = None,
) -> Image.Image:
    """Reads a picture as RGB.

    The orientation of EXIF is applied. Transparent parts are laid on white. Grey of more than 8 bit is scaled from its
    own range of values.

    Args:
        formats: names of the file formats that are accepted, as Pillow has them. None accepts all.
        max_side: longest side in pixels. A larger picture is refused before it is decoded.
        channels: where an array has its channels. None to see it from the shape.

    Raises:
        PictureUnreachable: it exists, but the system or the network cannot give it.
        UserError: it is missing, not a picture, broken, or larger than ``max_side`` or PIL's limit of pixels.
    """
    name = source if isinstance(source, Path) else _short(source) if isinstance(source, str) else None
    name = f"<{type(source).__name__}>" if name is None else name
    try:
        with warnings.catch_warnings(), _whole_pictures():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _as_rgb(source)
            if isinstance(source, bytearray | memoryview):  # a memoryview has a shape too
                source = bytes(source)
            if hasattr(source, "shape"):
                return _as_rgb(_from_array(source, name, channels))
            if not isinstance(source, str | bytes | os.PathLike) and not hasattr(source, "read"):
                raise UserError("not a picture", name, "give a path, a URL, bytes, a PIL picture or an array")
            if isinstance(source, str) and (content := _from_url(source)) is not None:
                source = content
            if formats is not None:
                Image.init()
                formats = [each for each in formats if each in Image.OPEN]  # an older Pillow has fewer
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
                if max_side is not None and max(image.size) > max_side:
                    width, height = image.size
                    raise UserError(f"picture of {width} x {height} pixels", name, f"give at most {max_side} a side")
                return _as_rgb(image)
    except FileNotFoundError:
        raise UserError("picture not found", name) from None
    except UnidentifiedImageError:
        raise UserError("not a picture, or of an unknown format", name) from None
    except Image.DecompressionBombError:
        raise UserError("picture has too many pixels", name, "make it smaller") from None
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise anything on broken files
        if isinstance(error, OSError) and error.errno is not None:
            raise PictureUnreachable(f"picture cannot be read ({error.strerror})", name) from None
        raise UserError(f"picture cannot be read ({reason_of(error)})", name) from None


@contextmanager
def _whole_pictures() -> Iterator[None]:
    """A truncated picture is an error here, also if other code (lmms-eval) has told Pillow to fill it with grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _as_rgb(image: Image.Image) -> Image.Image:
    _check_png(image)
    image.load()
    if 0 in image.size:
        raise ValueError("it has no pixels")
    upright = _upright(image)
    if upright.mode == "La":  # Pillow converts it to LA only
        upright = upright.convert("LA")
    if upright.mode in DEEP_MODES:
        return _scaled(upright).convert("RGB")
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return upright.convert("RGB")


def _check_png(image: Image.Image) -> None:
    """Raises `ValueError` for a PNG whose compressed data ends before its last row: Pillow leaves the rest black.

    An image that has been loaded is not checked. Other formats with a valid end after too little data, such as JPEG and
    GIF, cannot be told from whole ones. A file that is simply cut fails when it is loaded, in any format.
    """
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile or image.fp is None:
        return
    file, start = image.fp, image.fp.tell()
    file.seek(16)  # behind the signature and the head of the first chunk
    width, height, bits, colour, interlaced = struct.unpack(">IIBBxxB", file.read(13))
    missing = sum(
        rows * (1 + (columns * bits * PNG_CHANNELS[colour] + 7) // 8)  # one byte of a row is its filter
        for x, y, across, down in (ADAM7 if interlaced else ((0, 0, 1, 1),))
        if (columns := -((x - width) // across)) > 0 and (rows := -((y - height) // down)) > 0
    )
    file.seek(image.tile[0][2] - 8)  # the head of the first chunk of data
    head, unpack = file.read(8), zlib.decompressobj()
    checked = head[4:] == b"IDAT"  # not a later frame
    while head[4:] == b"IDAT" and missing > 0:
        chunk = file.read(int.from_bytes(head[:4], "big"))
        while chunk and missing > 0:
            missing -= len(unpack.decompress(chunk, PART))
            chunk = unpack.unconsumed_tail
        file.seek(4, os.SEEK_CUR)  # the check sum
        head = file.read(8)
    file.seek(start)
    if checked and missing > 0:
        raise ValueError("its data ends before its last row")


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; as it is, if the EXIF cannot be read. `ImageOps.exif_transpose` fails on
    EXIF that it cannot read or write again."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's reader raises anything
        orientation = None
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bit → mode L: the lowest value is black, the highest white, and so is the value that the file
    says is transparent."""
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not numbers")
    key = image.info.get("transparency")
    clear = values == key if isinstance(key, int) else np.zeros(values.shape, bool)
    seen = values if clear.all() else values[~clear]
    low, high = float(seen.min()), float(seen.max())
    if low == high:  # one colour: its place in 8 bit, or in 16 bit if it is larger
        scaled = np.full(values.shape, min(max(low if low <= 255 else low / 257, 0.0), 255.0))
    else:
        scaled = (values - low) * (255.0 / (high - low))
    scaled[clear] = 255
    return Image.fromarray(scaled.round().astype(np.uint8))


def is_of_floats(source: ImageInput) -> bool:
    """Whether a picture is an array of floats."""
    return hasattr(source, "shape") and "float" in str(getattr(source, "dtype", ""))


def _from_array(source: Any, name: str | Path, channels: str | None = None) -> Image.Image:
    """A numpy array or a torch tensor as a picture."""
    import numpy as np

    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = source.float() if is_of_floats(source) else source  # numpy has no bfloat16
    values = np.asarray(source)
    if values.ndim == 3 and _has_channels_first(values.shape, channels, name):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise UserError(f"array of shape {list(values.shape)} is not a picture", name, "give [H, W, 3] or [3, H, W]")
    if values.dtype.kind not in "buif":
        raise UserError(f"array of {values.dtype} is not a picture", name, "give uint8")
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UserError("array of floats outside 0 to 1", name, "divide by 255, or give uint8")
        values = (values.astype(np.float64) * 255).round()
    elif values.dtype == bool:
        values = values * 255
    elif values.dtype != np.uint8 and (values.min() < 0 or values.max() > 255):
        raise UserError(f"array of {values.dtype} outside 0 to 255", name, "give uint8")
    return Image.fromarray(np.ascontiguousarray(values.astype(np.uint8)))


def _has_channels_first(shape: Sequence[int], channels: str | None, name: str | Path) -> bool:
    """Whether an array of three dimensions is [C, H, W]. Where both are possible, one of RGB is [H, W, C]."""
    if channels is not None:
        return channels == "channels_first"
    if shape[2] not in (1, 3, 4):
        return shape[0] in (1, 3, 4)
    if shape[0] == 3 or (shape[0] == shape[2] == 1 < shape[1]):
        fix = "give a PIL picture, or say input_data_format"
        raise UserError(f"array of shape {list(shape)} may be [C, H, W] or [H, W, C]", name, fix)
    return False


def _from_url(source: str) -> bytes | Path | None:
    """The content of a URL, the path of a ``file:`` URL, or None for a plain path."""
    kind = source.split(":", 1)[0].lower()
    if kind == "data" and "," in source:
        head, body = source.split(",", 1)
        if len(body) > 3 * MAX_DOWNLOAD:  # three characters of a byte, if it is quoted
            raise _too_large(_short(source))
        content = unquote_to_bytes(body)
        try:
            return base64.b64decode(b"".join(content.split()), validate=True) if _is_base64(head) else content
        except ValueError:
            raise UserError("data URL is not base64", _short(source)) from None
    if kind == "file":
        place = urlsplit(source)
        if place.netloc not in ("", "localhost"):
            raise UserError("file of another machine", _short(source), "give file:///path")
        return Path(url2pathname(place.path))
    if kind in ("http", "https"):
        return _download(source)
    return None


def _download(url: str) -> bytes:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise PictureUnreachable("picture of a URL, but HF_HUB_OFFLINE is set", url, "give a file, or unset it")
    try:
        with urlopen(Request(url, headers={"User-Agent": "msd"}), timeout=TIMEOUT) as response:
            content = _read_in_time(response)
    except HTTPError as error:
        raise PictureUnreachable(f"picture cannot be fetched (status {error.code})", url, "check the URL") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise PictureUnreachable(f"picture cannot be fetched ({reason})", url, "check URL and network") from None
    if len(content) > MAX_DOWNLOAD:
        raise _too_large(url)
    return content


def _read_in_time(response: Any) -> bytes:
    """The content of a response, up to one byte more than `MAX_DOWNLOAD`.

    Raises:
        TimeoutError: it takes longer than `DOWNLOAD_SECONDS`.
        HTTPException: the server ends it early.
    """
    end, content = time.monotonic() + DOWNLOAD_SECONDS, bytearray()
    while len(content) <= MAX_DOWNLOAD and (part := response.read1(2**16)):
        content += part
        if time.monotonic() > end:
            raise TimeoutError(f"it takes over {DOWNLOAD_SECONDS:.0f} s")
    if len(content) <= MAX_DOWNLOAD and response.length:
        raise HTTPException("the server ended it early")
    return bytes(content)


def _is_base64(head: str) -> bool:
    """Whether the head of a ``data:`` URL says so."""
    return head.lower().endswith(";base64")


def _too_large(where: str) -> UserError:
    """The error of a URL that gives more than `MAX_DOWNLOAD`."""
    return UserError(f"picture has over {MAX_DOWNLOAD // 2**20} MB", where, "make it smaller")


def _short(text: str) -> str:
    """For messages: a data URL has megabytes."""
    return text if len(text) <= 300 else f"{text[:60]}..."


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centres the picture on a square of its longer side, as LLaVA does.

    Args:
        image: RGB picture [h, w].
        colour: RGB of the border; LLaVA uses the mean of the image processor.

    Returns:
        RGB picture [max(h, w), max(h, w)].

    Raises:
        UserError: the longer side is over `MAX_SQUARE_SIDE`.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side > MAX_SQUARE_SIDE:
        raise UserError("picture too long to be padded to a square", f"{width} x {height}", "crop or shrink it")
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square

"""Pictures: reading them safely, and LLaVA's padding to a square."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .errors import UserError

MAX_SQUARE_SIDE = 16384
"""Longest side in pixels of a picture that is made square: 0.8 GB of RGB. A 1 x 60000 picture is a bomb once padded."""

READ_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, RuntimeError, OverflowError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip
"""What PIL's readers raise on broken files."""

ImageInput = str | Path | bytes | Image.Image


class PictureUnreachable(UserError):
    """The file system, not the picture, is the cause."""


def load_image(source: ImageInput) -> Image.Image:
    """Reads a picture from a file, from bytes, or from a PIL picture, as RGB.

    Raises:
        PictureUnreachable: the file exists, but the system cannot read it.
        UserError: the file is missing, not a picture, broken, or larger than PIL's limit of pixels.
    """
    name = source if isinstance(source, str | Path) else f"<{type(source).__name__}>"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return source.convert("RGB")
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return image.convert("RGB")
    except FileNotFoundError:
        raise UserError("picture not found", name) from None
    except UnidentifiedImageError:
        raise UserError("not a picture, or of an unknown format", name) from None
    except Image.DecompressionBombError:
        raise UserError("picture has too many pixels", name, "make it smaller") from None
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise PictureUnreachable(f"picture cannot be read ({error.strerror})", name) from None
        raise UserError(f"picture cannot be read ({error})", name) from None


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

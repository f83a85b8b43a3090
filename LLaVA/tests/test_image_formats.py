"""Every format and mode that Pillow writes is read as the same picture, or refused in one line; damage is one line."""

from __future__ import annotations

import io
from random import Random

import numpy as np
import pytest
from PIL import Image, features

from llava.errors import UserError
from llava.image import DEEP_MODES, load_image

Image.init()
FORMATS = sorted(
    name for name in Image.SAVE if name in Image.OPEN and name not in ("PDF", "EPS", "WMF", "BUFR", "GRIB", "HDF5")
)
"""Those that Pillow reads and writes, without a program beside it."""
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16")
LOSSY = 40
"""How much a grey value may differ after a lossy format, or a palette."""


def pattern(mode: str) -> Image.Image:
    """A dark square on a light ground."""
    grey = Image.new("L", (32, 32), 220)
    grey.paste(30, (8, 8, 24, 24))
    if mode == "I;16":
        return Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    if mode in ("I", "F"):
        return Image.fromarray(np.asarray(grey).astype(np.int32 if mode == "I" else np.float32))
    for step in {"PA": ("LA", "PA"), "HSV": ("RGB", "HSV"), "LAB": ("RGB",)}.get(mode, (mode,)):
        grey = grey.convert(step)
    return grey


def written(image: Image.Image, kind: str) -> bytes | None:
    """The file; None if Pillow does not write this mode in this format."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        return None
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_of_every_mode_is_the_same_or_refused(kind: str) -> None:
    read = 0
    for mode in MODES:
        data = written(pattern(mode), kind)
        if data is None or (mode in DEEP_MODES and Image.open(io.BytesIO(data)).mode not in DEEP_MODES):
            continue  # not written, or cut to 8 bit by Pillow's writer
        try:
            values = np.asarray(load_image(data).convert("L")).astype(int)
        except UserError as error:
            assert "\n" not in str(error), mode
            continue
        read += 1
        ground, square = values[1, 1], values[values.shape[0] // 2, values.shape[1] // 2]
        assert ground - square > 190 - 2 * LOSSY, (mode, ground, square)
    assert read or kind not in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def test_the_usual_formats_keep_every_mode() -> None:
    """What people have: a refusal here would be a loss."""
    pairs = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"),
        "GIF": ("1", "L", "P", "RGB"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"), "BMP": ("1", "L", "P", "RGB"),
    }  # fmt: skip
    pairs |= {"WEBP": ("L", "RGB", "RGBA")} if features.check("webp") else {}
    for kind, modes in pairs.items():
        for mode in modes:
            data = written(pattern(mode), kind)
            assert data is not None and load_image(data).size == (32, 32), (kind, mode)


def damaged(data: bytes, chance: Random) -> bytes:
    content = bytearray(data)
    if chance.random() < 0.3:
        return bytes(content[: chance.randrange(len(content))])
    for _ in range(chance.randrange(1, 6)):
        content[chance.randrange(min(len(content), 400))] = chance.randrange(256)
    return bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_damage_is_one_line_or_a_picture(kind: str) -> None:
    chance, tried = Random(kind), 0
    for mode in MODES:
        data = written(pattern(mode), kind)
        for _ in range(40 if data else 0):
            content = damaged(data or b"", chance)
            try:
                assert load_image(content).mode == "RGB"
            except UserError as error:
                assert "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{kind} {mode} {content!r}") from error
            tried += 1
    assert tried

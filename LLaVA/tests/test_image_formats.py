"""Every format and mode that Pillow writes is read as the same picture, or refused in one line; damage is one line."""

from __future__ import annotations

import io
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageCms, features

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


def in_memory(mode: str) -> Image.Image:
    """The dark square in a mode that Pillow has in memory only, or writes in few formats."""
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        lab = ImageCms.profileToProfile(pattern("RGB"), *profiles, outputMode="LAB")
        assert lab is not None
        return lab
    if mode.startswith("I;16"):
        deep = Image.new(mode, (32, 32), 220 * 256)
        deep.paste(30 * 256, (8, 8, 24, 24))
        return deep
    return pattern({"La": "LA", "RGBa": "RGBA", "RGBX": "RGB"}.get(mode, mode)).convert(mode)


@pytest.mark.parametrize("mode", [*MODES, "La", "RGBa", "RGBX", "I;16B", "I;16L", "I;16N"])
def test_a_picture_in_memory_of_every_mode(mode: str) -> None:
    values = np.asarray(load_image(in_memory(mode))).astype(int)
    wanted = (255, 0) if mode in (*DEEP_MODES, "1") else (220, 30)
    assert np.abs(values[1, 1] - wanted[0]).max() <= 2 and np.abs(values[16, 16] - wanted[1]).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_a_transparent_ground_in_memory_is_white(mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 8, 24, 24))
    image = image.convert("LA") if mode == "La" else image
    loaded = load_image(image.convert(mode))
    assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((16, 16)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_transparent_value_in_memory_is_white(mode: str) -> None:
    image = Image.new("L", (32, 32), 0)
    image.paste(255, (8, 8, 24, 24))
    image = image.convert(mode)
    image.info["transparency"] = image.getpixel((0, 0))
    loaded = load_image(image)
    assert loaded.getpixel((0, 0)) == loaded.getpixel((16, 16)) == (255, 255, 255)


@pytest.mark.parametrize("ground", [0, 65535])
def test_a_transparent_value_of_16_bit_is_white(ground: int) -> None:
    """It has no part in the range of values either."""
    deep = Image.new("I;16", (32, 32), ground)
    deep.paste(20000, (8, 8, 16, 24))
    deep.paste(30000, (16, 8, 24, 24))
    buffer = io.BytesIO()
    deep.save(buffer, "PNG", transparency=ground)
    loaded = load_image(buffer.getvalue())
    assert [loaded.getpixel((place, 12)) for place in (0, 10, 20)] == [(255,) * 3, (0,) * 3, (255,) * 3]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "MPO"])
def test_of_several_frames_the_first_is_read(kind: str) -> None:
    buffer = io.BytesIO()
    others = [Image.new("RGB", (32, 32), (255, 0, shade)) for shade in (0, 90)]
    pattern("RGB").save(buffer, kind, save_all=True, append_images=others)
    red, green, blue = load_image(buffer.getvalue()).getpixel((1, 1))  # type: ignore[misc]
    assert abs(red - 220) < 5 and abs(green - 220) < 5 and abs(blue - 220) < 5


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I", "F", "CMYK"])
@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_one_line(mode: str, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="it has no pixels"):
        load_image(Image.new(mode, size))


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_one_pixel(mode: str) -> None:
    assert load_image(Image.new(mode, (1, 1))).size == (1, 1)


def test_a_picture_that_is_closed_or_cut_is_one_line() -> None:
    closed = Image.new("RGB", (4, 4))
    closed.close()
    noise = written(Image.effect_noise((64, 64), 50), "PNG") or b""
    for image in (closed, Image.open(io.BytesIO(noise[: len(noise) // 2]))):
        with pytest.raises(UserError, match="cannot be read"):
            load_image(image)


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

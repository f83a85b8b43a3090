"""Reading pictures and padding them."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from llava.errors import UserError
from llava.image import ADAM7, MAX_SQUARE_SIDE, load_image, pad_to_square


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_path_bytes_and_picture_give_the_same(tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 3), (10, 20, 30))
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image), image):
        assert load_image(source).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert load_image(Image.new(mode, (4, 4))).mode == "RGB"


def test_what_cannot_be_read(tmp_path: Path) -> None:
    whole = encoded(Image.effect_noise((64, 64), 50))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in [
        ("none.png", "picture not found"),
        ("text.png", "not a picture"),
        ("empty.png", "not a picture"),
        ("cut.png", "picture cannot be read"),
    ]:
        with pytest.raises(UserError, match=f"{message}.*{name}"):
            load_image(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        load_image(tmp_path)
    with pytest.raises(UserError, match=r"not a picture.*<bytes>"):
        load_image(b"\x00\x01")


def test_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="too many pixels"):
        load_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # over the limit that warns, under the one that refuses
    assert load_image(data).size == (100, 100)


def test_limits_of_the_caller() -> None:
    """A picture that is too large is refused by its header: this one has no more."""
    wide = encoded(Image.new("RGB", (9, 2)))
    assert load_image(wide, formats=["JPEG", "PNG", "NONE"], max_side=9).size == (9, 2)
    with pytest.raises(UserError, match=r"picture of 9 x 2 pixels.*at most 8"):
        load_image(wide[: wide.index(b"IDAT") + 8], max_side=8)
    with pytest.raises(UserError, match="unknown format"):
        load_image(wide, formats=["JPEG"])


@pytest.mark.parametrize(("size", "box"), [((5, 2), (0, 1, 5, 3)), ((2, 5), (1, 0, 3, 5)), ((4, 4), (0, 0, 4, 4))])
def test_pad_centres_on_the_longer_side(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    square = pad_to_square(Image.new("RGB", size, (255, 0, 0)), (1, 2, 3))
    side = max(size)
    assert square.size == (side, side)
    for x in range(side):
        for y in range(side):
            inside = box[0] <= x < box[2] and box[1] <= y < box[3]
            assert square.getpixel((x, y)) == ((255, 0, 0) if inside else (1, 2, 3))


def test_a_line_is_not_blown_up() -> None:
    with pytest.raises(UserError, match="too long to be padded to a square"):
        pad_to_square(Image.new("RGB", (MAX_SQUARE_SIDE + 1, 1)), (0, 0, 0))


def test_a_cut_picture_is_refused_whatever_pillow_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(UserError, match="picture cannot be read"):
        load_image(whole[: len(whole) // 2])


def shortened(data: bytes, rows: float, chunk: int = 50) -> bytes:
    """A PNG of 8 rows with data of the first ``rows`` alone, in chunks of its own and with a valid end."""
    head, rest = data[: data.index(b"IDAT") - 4], b""
    while data.find(b"IDAT") >= 0:
        place = data.index(b"IDAT")
        length = int.from_bytes(data[place - 4 : place], "big")
        rest, data = rest + data[place + 4 : place + 4 + length], data[place + 8 + length :]
    whole = zlib.decompress(rest)
    packed = zlib.compress(whole[: int(len(whole) * rows / 8)])
    parts = [b"IDAT" + packed[start : start + chunk] for start in range(0, len(packed), chunk)]
    for part in [*parts, b"IEND"]:
        head += (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
    return head


PNG_MODES = ("1", "P", "L", "LA", "RGB", "RGBA", "I;16")


@pytest.mark.parametrize("mode", PNG_MODES)
def test_a_png_with_too_few_rows_is_refused(mode: str, tmp_path: Path) -> None:
    """Pillow shows the missing rows black."""
    noise = Image.effect_noise((11, 8), 90)
    made = noise.convert("I").convert(mode) if mode == "I;16" else noise.convert(mode)
    data = encoded(made)
    wanted = load_image(made).tobytes()
    assert load_image(data).tobytes() == load_image(shortened(data, 8)).tobytes() == wanted
    for rows in (0, 0.5, 7, 7.9):
        with pytest.raises(UserError, match="its data ends before its last row"):
            load_image(shortened(data, rows))
    path = tmp_path / "short.png"
    path.write_bytes(shortened(data, 7))
    with pytest.raises(UserError, match=r"ends before its last row\): .*short\.png"):
        load_image(path)
    with Image.open(path) as opened, pytest.raises(UserError, match="ends before its last row"):
        load_image(opened)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 7), (16, 16)])
def test_an_interlaced_png_is_read_whole(size: tuple[int, int]) -> None:
    """Pillow does not write them, so the passes are laid out here; grey of 8 bit, without filters."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    passes = [pixels[y::down, x::across] for x, y, across, down in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    for data, whole in ((rows, True), (rows[:-1], False)):
        header = struct.pack(">II5B", width, height, 8, 0, 0, 0, 1)
        chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(data), b"IEND")
        png = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in chunks
        )
        if whole:
            assert (np.asarray(load_image(png))[..., 0] == pixels).all()
        else:
            with pytest.raises(UserError, match="ends before its last row"):
                load_image(png)


def test_a_later_frame_of_an_animated_png() -> None:
    frames = [Image.effect_noise((8, 8), each).convert("RGB") for each in (20, 90)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    with Image.open(buffer) as opened:
        opened.seek(1)
        assert load_image(opened).tobytes() == frames[1].tobytes()


def picture() -> Image.Image:
    """Four corners of different colours."""
    image = Image.new("RGB", (6, 4), "white")
    for place, colour in (((0, 0), "red"), ((5, 0), "green"), ((0, 3), "blue"), ((5, 3), "black")):
        image.putpixel(place, ImageColor.getrgb(colour))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = picture().transpose(turns[orientation]) if orientation in turns else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    assert load_image(buffer.getvalue()).tobytes() == picture().tobytes()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("scale", [1, 200])
def test_deep_grey_keeps_its_picture(mode: str, scale: int) -> None:
    ramp = np.linspace(0, 255, 256).reshape(16, 16).round()
    deep = (ramp * scale + 7).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    image = Image.fromarray(deep)
    assert image.mode == mode
    assert np.array_equal(np.asarray(load_image(image))[..., 0], ramp.astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    assert np.array_equal(np.asarray(load_image(buffer.getvalue()))[..., 0], ramp.astype(np.uint8))


def test_deep_grey_that_is_not_a_number() -> None:
    with pytest.raises(UserError, match="not numbers"):
        load_image(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode: str) -> None:
    """Black strokes on a transparent ground."""
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (2, 2, 4, 4))
    loaded = load_image(encoded(drawing.convert(mode)))
    assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((3, 3)) == (0, 0, 0)


def test_a_transparent_colour_is_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (9, 9, 9)).save(buffer, "PNG", transparency=(9, 9, 9))
    assert load_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_hide_the_picture(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(buffer, kind, exif=b"Exif\0\0II*\0garbage that is no directory")
    assert load_image(buffer.getvalue()).size == (9, 5)


def test_arrays() -> None:
    values = np.asarray(picture())
    wanted = picture().tobytes()
    for array in (
        values, values.transpose(2, 0, 1), values / 255.0, torch.from_numpy(values.copy()).permute(2, 0, 1),
        torch.from_numpy(values.copy()).permute(2, 0, 1) / 255,
    ):  # fmt: skip
        assert load_image(array).tobytes() == wanted
    assert load_image(values[..., 0]).getpixel((0, 0)) == (255, 255, 255)
    for array, said in (
        (values * 1.0, "outside 0 to 1"), (values.astype(np.int64) + 300, "outside 0 to 255"),
        (np.zeros((2, 2, 7), np.uint8), "not a picture"), (np.zeros((0, 2, 3), np.uint8), "not a picture"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            load_image(array)


ARRAYS = {
    "bool": lambda values: values > 127, "uint16": lambda values: values.astype(np.uint16),
    "int64": lambda values: values.astype(np.int64), "big endian": lambda values: values.astype(">i4"),
    "float16": lambda values: (values / 255).astype(np.float16), "float64": lambda values: values / 255,
    "torch bool": lambda values: torch.from_numpy(values > 127),
    "torch float16": lambda values: (torch.from_numpy(values) / 255).half(),
    "torch bfloat16": lambda values: (torch.from_numpy(values) / 255).bfloat16(),
    "torch with gradient": lambda values: (torch.from_numpy(values) / 255).requires_grad_(),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind(kind: str) -> None:
    """Black, white and between, channels last and first."""
    values = np.zeros((8, 10, 3), np.uint8)
    values[2:5, 3:7] = 255
    values[6, :, 0] = 0 if "bool" in kind else 128
    for array in (ARRAYS[kind](values), ARRAYS[kind](values.transpose(2, 0, 1).copy())):
        found = np.asarray(load_image(array)).astype(int)
        assert np.abs(found - values).max() <= (1 if "float16" in kind else 0)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((8, 8, 3), np.complex64), "array of complex64 is not a picture"),
        (torch.zeros(8, 8, 3, dtype=torch.complex64), "array of complex64"),
        (np.full((8, 8, 3), np.nan), "floats outside 0 to 1"),
        (torch.full((3, 8, 8), float("nan"), dtype=torch.bfloat16), "floats outside 0 to 1"),
        (np.zeros((8, 8), object), "array of object"),
        (np.full((8, 8), "a"), "array of <U1"),
        (np.full((8, 8), 300, np.uint16), "uint16 outside 0 to 255"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"shape \[2, 3, 8, 8\]"),
        (np.zeros(5, np.uint8), r"shape \[5\]"),
        (np.uint8(5), r"shape \[\]"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \[8, 8, 2\]"),
        (torch.zeros(3, 0, 8), r"shape \[0, 8, 3\]"),
        (torch.zeros(3, 8, 8, device="meta"), "cannot be read"),
        (np.zeros((3, 9, 3), np.uint8), r"may be \[C, H, W\] or \[H, W, C\]"),
    ],
    ids=str,
)
def test_arrays_that_are_no_pictures(array: object, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        load_image(array)
    assert "\n" not in str(raised.value)


def test_arrays_that_fit_both_orders() -> None:
    values = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert load_image(values, channels="channels_last").getpixel((1, 0)) == (3, 4, 5)
    assert load_image(values, channels="channels_first").getpixel((1, 0)) == (1, 10, 19)
    assert load_image(np.zeros((1, 1, 3), np.uint8)).size == (1, 1)
    assert load_image(np.zeros((1, 9, 3), np.uint8)).size == (9, 1)


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "a b.png")
    data = base64.b64encode(encoded(picture())).decode()
    for url in ((tmp_path / "a b.png").as_uri(), f"data:image/png;base64,{data}"):
        assert load_image(url).tobytes() == picture().tobytes()
    for body in (data.replace("+", "%2B"), "\n".join(data[at : at + 76] for at in range(0, len(data), 76))):
        assert load_image(f"data:image/png;BASE64,{body}").tobytes() == picture().tobytes()
    with pytest.raises(UserError, match="not base64"):
        load_image("data:image/png;base64,@@@")
    with pytest.raises(UserError, match="of another machine"):
        load_image(f"file://server{tmp_path}/a%20b.png")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="picture has over"):
        patch.setattr("llava.image.MAX_DOWNLOAD", 10)
        load_image(f"data:image/png;base64,{data}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_image("http://127.0.0.1:9/a.png")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match="picture cannot be fetched"):
        load_image("http://127.0.0.1:9/a.png")


def test_a_url_that_gives_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("llava.image.MAX_DOWNLOAD", 100)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="picture has over"):
            load_image(f"http://127.0.0.1:{server.server_port}/a.png")
        server.shutdown()


@pytest.mark.parametrize(("path", "said"), [("drip", "takes over"), ("short", "ended it early")])
def test_a_url_that_gives_too_little(path: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends a byte now and then, and one that sends less than it says."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("llava.image.DOWNLOAD_SECONDS", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=said):
            load_image(f"http://127.0.0.1:{server.server_port}/{path}")
        server.shutdown()


class Endless(BaseHTTPRequestHandler):
    """Serves a kilobyte of nothing; byte by byte as /drip, and less than it says as /short."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/short":
            self.send_header("Content-Length", "5000")
        self.end_headers()
        if self.path != "/drip":
            self.wfile.write(b"\0" * 1024)
            return
        with suppress(OSError):  # the client has left
            for _ in range(100):
                self.wfile.write(b"\0")
                time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        """Silent."""

"""Reading pictures and padding them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import UserError
from llava.image import MAX_SQUARE_SIDE, load_image, pad_to_square


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

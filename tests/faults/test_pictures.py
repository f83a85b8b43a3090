"""Pictures that would fill the memory, at the command line."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from fault_support import damaged
from PIL import Image, ImageFile

from eagle.cli import main
from llava.errors import UserError
from llava.image import load_image


def png(path: Path, width: int, height: int) -> Path:
    """A PNG that claims this size; its data are black rows, a thousandth of it once packed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(((width + 7) // 8 + 1) * height, 10_000_000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((50_000, 50_000), "picture has too many pixels"),
        ((50_000, 1), "picture too long to be padded to a square"),
        ((1, 50_000), "picture too long to be padded to a square"),
        ((2**31 - 1, 2**31 - 1), "picture"),
        ((0, 0), "picture"),
    ],
)
def test_a_bomb_is_one_line(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: tuple[int, int], message: str
) -> None:
    picture = png(tmp_path / "bomb.png", *size)
    assert picture.stat().st_size < 100_000
    models = ["--base-model", str(pair / "base"), "--msd-model", str(pair / "draft"), "--dtype", "float32"]
    assert main(["generate", *models, "--prompt", "What?", "--image", str(picture), "--max-new-tokens", "3"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_pictures_are_read_or_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval, imported by other tests, sets it
    path = tmp_path / "a"
    Image.effect_noise((40, 30), 60).convert("RGB").save(path, kind)
    whole, refused = path.read_bytes(), 0
    for data in damaged(whole, 60, seed=len(kind)):
        path.write_bytes(data)
        try:
            assert load_image(path).mode == "RGB"
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5

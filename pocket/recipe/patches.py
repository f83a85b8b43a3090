"""What each patch of a picture shows: the labels the vision tower is trained on before anything else.

A patch is labelled with the tokens of what is written on it, of its colours and of what the part it belongs to means;
with the written words, the meaning and its place as statements (each a bucket of a hash); and with how much of it each
colour covers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .draw import ROW, Note, Sketch, font
from .encode import SIDE, Tokenizer, pixels_of
from .spec import SCENE_COLOURS, spoken

GRID = SIDE // ROW
BUCKETS = 1024
COVERED = 0.06  # share of a patch that a colour must cover to be named
OVERLAP = 3  # pixels a letter or a shape must reach into a patch to count


@dataclass(frozen=True)
class Labelled:
    """A picture and the labels of its patches, row by row.

    pixels: (3, SIDE, SIDE); tokens and buckets: (patch, id) pairs; cover: (GRID * GRID, colours), shares.
    """

    pixels: np.ndarray
    tokens: list[tuple[int, int]]
    buckets: list[tuple[int, int]]
    cover: np.ndarray


def bucket(statement: str) -> int:
    """The bucket of a statement."""
    return zlib.crc32(statement.encode()) % BUCKETS


def _packed(colours: np.ndarray) -> np.ndarray:
    """One number for each colour: (..., 3) to (...)."""
    wide = colours.astype(np.int32)
    return (wide[..., 0] << 16) + (wide[..., 1] << 8) + wide[..., 2]


def colour_cover(image: Image.Image) -> np.ndarray:
    """The share of each patch in each colour, (GRID * GRID, colours), of a square picture."""
    packed = _packed(np.asarray(image.convert("RGB")))  # [S, S]
    palette = _packed(np.array(list(SCENE_COLOURS.values())))
    shares = [(packed == colour).reshape(GRID, ROW, GRID, ROW).mean((1, 3)).ravel() for colour in palette]
    return np.stack(shares, -1).astype(np.float32)


def _columns(left: float, right: float) -> range:
    """The columns of patches that an extent reaches into."""
    reach = min(OVERLAP, (right - left) / 2)
    first = max(0, int((left + reach) // ROW))
    return range(first, max(first, min(GRID - 1, int((right - reach) // ROW))) + 1)


def _tokens(tokenizer: Tokenizer, text: str) -> list[tuple[int, str]]:
    return [(token, piece) for token, piece in tokenizer.pieces(text) if piece.strip("▁")]


def _written(tokenizer: Tokenizer, note: Note) -> list[tuple[int, float, float]]:
    """(token, left, right) of every token that is written."""
    found, done, left = [], "", note.box[0]
    for token, piece in tokenizer.pieces(note.text):
        start = font(note.size).getlength(done)
        done = (done + piece.replace("▁", " ")).lstrip(" ")
        if piece.strip("▁"):
            found.append((token, left + start, left + font(note.size).getlength(done)))
    return found


def label(tokenizer: Tokenizer, sketch: Sketch) -> Labelled:
    """Pixels and labels of a picture, after the padding to a square."""
    width, height = sketch.image.size
    dx, dy = (SIDE - width) // 2, (SIDE - height) // 2
    square = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    square.paste(sketch.image, (dx, dy))
    cover = colour_cover(square)
    tokens: set[tuple[int, int]] = set()
    buckets = {(patch, bucket(f"at {patch}")) for patch in range(GRID * GRID)}
    for note in sketch.notes:
        left, top, right, bottom = note.box
        meant = [token for word in spoken(note.said) for token, _ in _tokens(tokenizer, word)]
        statements = [*note.said, f"written {note.text}"] if note.text else list(note.said)
        spans = [(token, left, right) for token in meant]
        spans += _written(tokenizer, note) if note.text else []
        for row in _columns(top + dy, bottom + dy):
            patches = [row * GRID + c for c in _columns(left + dx, right + dx)]
            buckets |= {(patch, bucket(statement)) for patch in patches for statement in statements}
            for token, start, end in spans:
                tokens |= {(row * GRID + c, token) for c in _columns(start + dx, end + dx)}
    named = [[token for token, _ in _tokens(tokenizer, name)] for name in SCENE_COLOURS]
    tokens |= {(int(p), token) for p, c in np.argwhere(cover > COVERED) for token in named[c]}
    return Labelled(pixels_of(sketch.image), sorted(tokens), sorted(buckets), cover)


def _spread(pairs: list[list[tuple[int, int]]], width: int) -> torch.Tensor:
    """(batch, patches, width): the pairs as shares that add up to 1 in a patch, or to 0 in an empty one."""
    out = torch.zeros(len(pairs), GRID * GRID, width)
    for row, items in enumerate(pairs):
        if items:
            patch, ids = zip(*items, strict=True)
            out[row, list(patch), list(ids)] = 1.0
    return out / out.sum(-1, keepdim=True).clamp(min=1)


def collate_labels(batch: list[Labelled], vocabulary: int) -> dict[str, torch.Tensor]:
    """pixels (B, 3, SIDE, SIDE), tokens (B, P, vocabulary), buckets (B, P, BUCKETS), cover (B, P, colours)."""
    return {
        "pixels": torch.stack([torch.from_numpy(item.pixels) for item in batch]),
        "tokens": _spread([item.tokens for item in batch], vocabulary),
        "buckets": _spread([item.buckets for item in batch], BUCKETS),
        "cover": torch.stack([torch.from_numpy(item.cover) for item in batch]),
    }

"""The vicuna_v1 prompt of LLaVA-1.5, its tokens and the loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
IMAGE_TOKEN_ID = 0
IMAGE_TOKENS = 100
BOS, EOS = 1, 2
IGNORE = -100
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE = 160


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids, labels (IGNORE where there is no loss) and the picture's pixels."""

    ids: list[int]
    labels: list[int]
    pixels: np.ndarray | None


class Tokenizer:
    """SentencePiece as LLaVA-1.5 uses it: only the start of a piece gets a leading space."""

    def __init__(self, folder: Path) -> None:
        """Load tokenizer.model from a model folder."""
        from sentencepiece import SentencePieceProcessor

        self._pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self._newline = len(self.start("\n"))

    def start(self, text: str) -> list[int]:
        """Tokens of text at the start of a piece."""
        return list(self._pieces.encode(text))

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """Tokens of text with what each stands for; the mark of a space is kept."""
        return [(i, str(self._pieces.id_to_piece(i))) for i in self.start(text)]

    def go_on(self, text: str) -> list[int]:
        """Tokens of text which follows other text of the same piece."""
        return self.start("\n" + text)[self._newline :]  # a newline is a byte token and never merges

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special ones left out."""
        return str(self._pieces.decode([i for i in ids if i > EOS])).strip()


def pad_to_square(image: Image.Image) -> Image.Image:
    """LLaVA's padding: the picture in the middle of a square of CLIP's mean colour."""
    side = max(image.size)
    if image.size == (side, side):
        return image.convert("RGB")
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def pixels_of(image: Image.Image) -> np.ndarray:
    """pixels: (3, SIDE, SIDE), float32, normalised as CLIP does."""
    square = pad_to_square(image)
    if square.size != (SIDE, SIDE):
        square = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    array = np.asarray(square, dtype=np.float32) / 255.0
    return ((array - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(2, 0, 1).copy()


def encode(tokenizer: Tokenizer, turns: Sequence[tuple[str, str | None]], pixels: np.ndarray | None) -> Encoded:
    """Tokens of a conversation; each piece around the picture is tokenised on its own.

    Only answers and the </s> behind them carry loss. The last answer may be None: then the tokens end where the
    assistant has to speak.
    """
    ids = [BOS, *tokenizer.start(f"{SYSTEM} USER: ")]
    if pixels is not None:
        ids += [IMAGE_TOKEN_ID] * IMAGE_TOKENS
    else:
        ids = [BOS]
    labels = [IGNORE] * len(ids)
    for i, (question, answer) in enumerate(turns):
        if i == 0 and pixels is not None:
            part = tokenizer.start(f"\n{question} ASSISTANT:")
        elif i == 0:
            part = tokenizer.start(f"{SYSTEM} USER: {question} ASSISTANT:")
        else:
            part = tokenizer.go_on(f"USER: {question} ASSISTANT:")
        ids += part
        labels += [IGNORE] * len(part)
        if answer is not None:
            part = [*tokenizer.go_on(f" {answer}"), EOS]
            ids += part
            labels += part
    return Encoded(ids, labels, pixels)


def collate(batch: Iterable[Encoded], multiple: int = 32) -> dict[str, torch.Tensor]:
    """Right-padded tensors: ids and labels (batch, length), pixels (pictures, 3, SIDE, SIDE)."""
    items = list(batch)
    length = max(len(e.ids) for e in items)
    length = -(-length // multiple) * multiple
    ids = torch.full((len(items), length), EOS)
    labels = torch.full((len(items), length), IGNORE)
    for row, e in enumerate(items):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        labels[row, : len(e.labels)] = torch.tensor(e.labels)
    pixels = [torch.from_numpy(e.pixels) for e in items if e.pixels is not None]
    stacked = torch.stack(pixels) if pixels else torch.zeros(0, 3, SIDE, SIDE)
    return {"ids": ids, "labels": labels, "pixels": stacked}

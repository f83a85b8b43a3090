"""A conversation as its family writes it: the prompt, its ids, and which of them the assistant says.

To add a family, subclass `Template` (three methods) and name it in `eagle.ge_data.templates`. Ids are those of the
whole prompt as the family's processor makes them at inference; the assistant's tokens are found by their places in the
text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from eagle.ge_data.conversations import MARK, Conversation, Unusable
from llava.errors import UserError
from llava.image import load_image


class Segment(NamedTuple):
    """A part of the prompt. ``spoken``: the assistant says it (the answer with its end token)."""

    text: str
    spoken: bool


class Encoded(NamedTuple):
    """Ids [S] of a prompt, the characters (start, end) of the prompt that each stands for, and the family's image
    inputs."""

    input_ids: list[int]
    spans: list[tuple[int, int]]
    images: dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A conversation as model inputs. ``input_ids`` [S] int64, ``loss_mask`` [S] bool, ``images`` without batch
    dimension of their own: tensors of several conversations are joined along dimension 0."""

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    images: dict[str, Tensor]


class Template(ABC):
    """How a family writes a conversation. ``processor``: that of the family's `Target`."""

    family: ClassVar[str]

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self.processor = processor
        self.image_token_id = image_token_id

    @staticmethod
    @abstractmethod
    def load_processor(model: str) -> Any:
        """The processor of a checkpoint, without its weights."""

    @abstractmethod
    def segments(self, conversation: Conversation) -> list[Segment]:
        """The whole prompt in parts."""

    @abstractmethod
    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> Encoded:
        """Ids as at inference, with one id for each image feature.

        Raises:
            Unusable: the tokenizer cannot write the text, or the image processor refuses a picture.
        """

    def prepare(self, conversation: Conversation, image_root: Path, max_length: int) -> Prepared:
        """Model inputs of a conversation, not longer than ``max_length`` tokens.

        A longer one is cut at its end, as the published recipe does, but never through a picture.

        Raises:
            Unusable: a picture is missing or broken, a picture or every answer would be cut, or the text has no ids.
        """
        pictures = [_open_picture(image_root / name) for name in conversation.images]
        segments = self.segments(conversation)
        encoded = self.encode("".join(segment.text for segment in segments), pictures)
        ids = torch.tensor(encoded.input_ids)  # [S]
        loss_mask = spoken_mask(segments, encoded.spans) & (ids != self.image_token_id)
        if (ids[max_length:] == self.image_token_id).any():
            raise Unusable("image_cut")
        if not loss_mask[:max_length].any():
            raise Unusable("answer_cut")
        return Prepared(conversation.id, ids[:max_length], loss_mask[:max_length], encoded.images)


def spoken_mask(segments: Sequence[Segment], spans: Sequence[tuple[int, int]]) -> Tensor:
    """[S] bool: the tokens whose first character is the assistant's.

    >>> spoken_mask([Segment("ab", False), Segment("cd", True)], [(0, 0), (0, 2), (2, 3), (3, 4)]).tolist()
    [False, False, True, True]
    """
    ends = list(accumulate(len(segment.text) for segment in segments))
    mask, number = [], 0
    for start, end in spans:
        while number < len(ends) and start >= ends[number]:
            number += 1
        mask.append(end > start and number < len(segments) and segments[number].spoken)
    return torch.tensor(mask, dtype=torch.bool)


def mark_first(question: str) -> str:
    """A single picture comes before the words, as in LLaVA's own training."""
    if question.count(MARK) != 1:
        return question
    return f"{MARK}\n{question.replace(MARK, '').strip()}".strip()


def _open_picture(path: Path) -> Image.Image:
    if not path.is_file():
        raise Unusable("missing_picture")
    try:
        return load_image(path)
    except UserError:
        raise Unusable("broken_picture") from None

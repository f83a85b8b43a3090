"""A conversation as its family writes it: the prompt, its ids, and which of them the assistant says.

To add a family, subclass `Template` (four methods) and name it in `eagle.families.templates`. Ids are those of the
whole prompt as the family's processor makes them at inference; the assistant's tokens are found by their places in the
text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from eagle.conversation_pictures import open_picture
from eagle.conversations import MARK, Conversation, Unusable

BLANK = "OK"
"""Stands for an answer that is not known yet. Any short word does: its ids are dropped, and ids on the other sides of
an end token do not depend on it."""


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


class Turn(NamedTuple):
    """A question whose answer is not known. ``asked``: the ids from the answer before to where the answer begins;
    ``end``: those that close it; ``pictures``: how many the question shows."""

    asked: list[int]
    end: list[int]
    pictures: int


@dataclass(frozen=True)
class Outline:
    """A conversation without its answers. ``images``: as in `Prepared`, of all turns."""

    id: str
    turns: tuple[Turn, ...]
    images: dict[str, Tensor]


class Template(ABC):
    """How a family writes a conversation.

    Args:
        processor: that of the family's `Target`.
        image_token_id: id of an image feature's place.
        video_token_id: the same for videos, where the family has them.
    """

    family: ClassVar[str]

    def __init__(self, processor: Any, image_token_id: int, video_token_id: int | None = None) -> None:
        self.processor = processor
        self.image_token_id = image_token_id
        self.media_ids = frozenset(index for index in (image_token_id, video_token_id) if index is not None)

    @property
    def least_picture_tokens(self) -> int:
        """Image tokens that any picture has at least."""
        return 1

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

    def grids(self, images: dict[str, Tensor]) -> Tensor:
        """[P, 3] frames, rows and columns of the features of each picture, int64; none where the family's positions do
        not need them. ``images``: as in `Prepared`."""
        return torch.empty(0, 3, dtype=torch.int64)

    @abstractmethod
    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The image inputs of the first ``count`` pictures among those of a conversation; {} for none."""

    def prepare(self, conversation: Conversation, image_root: Path, max_length: int) -> Prepared:
        """Model inputs of a conversation, not longer than ``max_length`` tokens.

        A longer one is cut at its end, as the published recipe does, but never through a picture.

        Raises:
            Unusable: a picture is missing or broken, a picture or every answer would be cut, or the text has no ids.
            UserError: the file system does not let a picture be read.
        """
        pictures = self._open_pictures(conversation, image_root, max_length)
        segments = self.segments(conversation)
        encoded = self.encode("".join(segment.text for segment in segments), pictures)
        ids = torch.tensor(encoded.input_ids)  # [S]
        loss_mask = spoken_mask(segments, encoded.spans) & (ids != self.image_token_id)
        if (ids[max_length:] == self.image_token_id).any():
            raise Unusable("image_cut")
        if not loss_mask[:max_length].any():
            raise Unusable("answer_cut")
        return Prepared(conversation.id, ids[:max_length], loss_mask[:max_length], encoded.images)

    def request(self, prompts: Sequence[list[int]], images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Inputs of `generate` for conversations that wait for an answer: what the processor would give.

        Args:
            prompts: ids of each, with one for each image feature.
            images: image inputs of the pictures in each.
        """
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])  # [B, S]
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        return {"input_ids": input_ids, "attention_mask": mask, **join_images(images)}

    def outline(self, conversation: Conversation, image_root: Path, max_length: int) -> Outline:
        """The questions of a conversation, with the ids that they have whatever is answered.

        Raises:
            Unusable: a picture is missing or broken, all of them are more than ``max_length`` tokens, the text has no
            ids, or the template rewrites answers.
        """
        pictures = self._open_pictures(conversation, image_root, max_length)
        questions = [question for question, _ in conversation.turns]
        blank = replace(conversation, turns=tuple((question, BLANK) for question in questions))
        texts: list[str] = []  # question, blank answer, its end; and so on
        for segment in self.segments(blank):
            before, found, end = segment.text.rpartition(BLANK) if segment.spoken else (segment.text, "", "")
            if segment.spoken and not found:
                raise Unusable("template")
            texts += [before + found, end] if segment.spoken else [before]
        encoded = self.encode("".join(texts), pictures)
        parts: list[list[int]] = [[] for _ in texts]
        for token, part in zip(encoded.input_ids, owners([len(text) for text in texts], encoded.spans), strict=True):
            parts[min(part, len(parts) - 1)].append(token)
        turns = [
            Turn(asked, end, question.count(MARK))
            for question, asked, end in zip(questions, parts[::3], parts[2::3], strict=True)
        ]
        return Outline(conversation.id, tuple(turns), encoded.images)

    def _open_pictures(self, conversation: Conversation, root: Path, max_length: int) -> list[Image.Image]:
        if len(conversation.images) * self.least_picture_tokens > max_length:
            raise Unusable("image_cut")  # before thousands of them fill the memory
        return [open_picture(root / name) for name in conversation.images]


def join_images(images: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The image inputs of several conversations as those of a batch; some may have none."""
    parts: dict[str, list[Tensor]] = {}
    for one in images:
        for name, value in one.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


def owners(lengths: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each token the part of the text in which its first character lies.

    Args:
        lengths: characters of each part.
        spans: characters (start, end) of each token, in order.

    >>> owners([2, 2], [(0, 0), (0, 2), (2, 3), (3, 4), (4, 4)])
    [0, 0, 1, 1, 2]
    """
    ends = list(accumulate(lengths))
    found, number = [], 0
    for start, _ in spans:
        while number < len(ends) and start >= ends[number]:
            number += 1
        found.append(number)
    return found


def spoken_mask(segments: Sequence[Segment], spans: Sequence[tuple[int, int]]) -> Tensor:
    """[S] bool: the tokens whose first character is the assistant's.

    >>> spoken_mask([Segment("ab", False), Segment("cd", True)], [(0, 0), (0, 2), (2, 3), (3, 4)]).tolist()
    [False, False, True, True]
    """
    parts = owners([len(segment.text) for segment in segments], spans)
    mask = [
        end > start and part < len(segments) and segments[part].spoken
        for (start, end), part in zip(spans, parts, strict=True)
    ]
    return torch.tensor(mask, dtype=torch.bool)


def mark_first(question: str) -> str:
    """A single picture comes before the words, as in LLaVA's own training."""
    if question.count(MARK) != 1:
        return question
    return f"{MARK}\n{question.replace(MARK, '').strip()}".strip()

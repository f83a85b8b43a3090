"""A conversation as its family writes it: the prompt, its ids, and which of them the assistant says.

Ids are those that the family's processor gives the whole prompt at inference. The assistant's tokens are found by their
places in the text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from eagle.conversations import MARK, Conversation, Unusable, open_picture, picture_path
from eagle.families.stock import load_processor, parts_of, special_tokens, write_chat
from llava.errors import UserError

PLACEHOLDER = "OK"
"""Stands for an answer that is not known yet. Any short word works: its ids are dropped, and the ids before and after
it do not depend on it, since an end token separates them."""
EARLIER = "\ue000answer\ue000"
"""Stands for the answers of earlier turns, to find where the last of them ends."""
Span = tuple[int, int]
"""Characters (start, end) of the prompt."""


class Segment(NamedTuple):
    """A part of the prompt. ``is_answer``: the assistant says it, with the end token."""

    text: str
    is_answer: bool


class Encoded(NamedTuple):
    """Ids [S] of a prompt, the characters that each stands for, and the family's image inputs."""

    input_ids: list[int]
    spans: list[Span]
    images: dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A conversation as model inputs. ``input_ids`` [S] int64; ``loss_mask`` [S] bool; ``images``: image inputs, joined
    with those of other conversations by `join_images`."""

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    images: dict[str, Tensor]


class Turn(NamedTuple):
    """A question whose answer is not known.

    ``asked``: ids from the end of the answer before to where the answer begins; ``end``: ids that close the answer;
    ``pictures``: number of pictures in the question.
    """

    asked: list[int]
    end: list[int]
    pictures: int


@dataclass(frozen=True)
class PromptOutline:
    """A conversation without its answers. ``images``: as in `Prepared`, of all turns."""

    id: str
    turns: tuple[Turn, ...]
    images: dict[str, Tensor]


class Template:
    """How a family writes a conversation. The defaults suit the processors of transformers.

    Args:
        processor: that of the family's `Target`.
        image_token_id: id at the place of an image feature.
        video_token_id: the same for videos, where the family has them.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def __init__(self, processor: Any, image_token_id: int, video_token_id: int | None = None) -> None:
        self.processor = processor
        self.image_token_id = image_token_id
        self.media_ids = frozenset(index for index in (image_token_id, video_token_id) if index is not None)

    @property
    def least_picture_tokens(self) -> int:
        """The fewest image tokens that a picture can have."""
        return 1

    @staticmethod
    def load_processor(model: str) -> Any:
        """The processor of a checkpoint, without its weights."""
        return load_processor(model)

    def write(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        """The prompt of turns (question, answer). Where the last answer is None, the prompt ends where it begins."""
        return write_chat(self.processor, [(parts_of(question), answer) for question, answer in turns], system)

    @property
    def image_mark(self) -> str:
        """What a prompt has in the place of a picture."""
        return self.processor.image_token

    @property
    def written_mark(self) -> str:
        """The text that the processor puts in the place of `image_mark`, with one image token."""
        return self.image_mark

    @property
    def inner_ids(self) -> frozenset[int]:
        """Ids that the processor puts between the image tokens of one picture."""
        return frozenset()

    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The image inputs of the first ``count`` pictures among those of a conversation; {} for none. By default each
        input has a row for each picture."""
        return {name: images[name][:count] for name in self.image_inputs} if count else {}

    def grids(self, images: dict[str, Tensor]) -> Tensor:
        """[P, 3] int64: frames, rows and columns of each picture's features. [0, 3] where the family's positions do not
        need them. ``images``: as in `Prepared`."""
        return torch.empty(0, 3, dtype=torch.int64)

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The whole prompt in parts: for each turn what is asked, and the answer.

        Where the template writes no end token after an answer, the tokenizer's is put there: the draft must learn
        where an answer ends. The end of an answer that is cut is a part of its own, which the assistant does not say.

        Raises:
            Unusable: the template cannot write the conversation turn after turn.
        """
        turns: list[tuple[str, str]] = []
        segments, before = [], ""
        for number, (question, answer) in enumerate(conversation.turns):
            question = mark_first(question)
            asked, written = self._turn(turns, question, answer, conversation.system)
            spoken, added = self._with_end(written, answer)
            own = (
                asked[len(before) :]
                if asked.startswith(before)
                else self._later_question(turns, question, conversation)
            )
            segments += [Segment(own, False), *answer_parts(spoken + added, answer, number in conversation.cut)]
            before = asked + spoken
            turns.append((question, answer))
        return segments

    def _turn(
        self, turns: Sequence[tuple[str, str]], question: str, answer: str, system: str | None
    ) -> tuple[str, str]:
        """The prompt to where the answer to the last question begins, and what the template writes after it."""
        try:
            asked = self.write([*turns, (question, None)], system)
            answered = self.write([*turns, (question, answer)], system)
        except UserError:
            raise Unusable("template") from None
        if not answered.startswith(asked):  # some templates write another white space before a given answer
            stem = asked.rstrip()
            following = answered.removeprefix(stem)
            asked = stem + following[: len(following) - len(following.lstrip())]
        if not answered.startswith(asked):
            raise Unusable("template")
        return asked, answered[len(asked) :]

    def _later_question(self, turns: Sequence[tuple[str, str]], question: str, conversation: Conversation) -> str:
        """What stands between the last answer of ``turns`` and the next one.

        For templates that write the last answer in another way than earlier ones, such as with an empty thought. Each
        answer is learnt as the last one is written, since it must follow what it follows at inference.
        """
        (*blank, last) = [(asked, EARLIER) for asked, _ in turns]
        end = self._turn(blank, *last, conversation.system)[1].rpartition(EARLIER)[2].rstrip("\n")
        asked = self._turn([*blank, last], question, EARLIER, conversation.system)[0]
        _, found, own = asked.rpartition(EARLIER)
        if not (found and own.startswith(end)):
            raise Unusable("template")
        return own.removeprefix(end)

    def _with_end(self, written: str, answer: str) -> tuple[str, str]:
        """What the assistant says of the text ``written`` for an answer, and the end token to add to it."""
        at = written.rfind(answer.strip())
        end = at + len(answer.strip())
        before = written[: max(at, 0)].strip()  # some templates write an empty thought
        if at < 0 or (before and not before.endswith("</think>")) or written[end:].strip():  # it writes an end itself
            return written.rstrip("\n"), ""  # a newline after the end token is not the assistant's
        return written[:end], self.processor.tokenizer.eos_token or ""

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> Encoded:
        """Ids as at inference, with one id for each image feature.

        Raises:
            Unusable: the tokenizer cannot encode the text, or the image processor refuses a picture.
        """
        mark, text = self.image_mark, self.written_mark
        special = special_tokens(self.processor, [prompt])
        written = self.processor.tokenizer(prompt.replace(mark, text), return_offsets_mapping=True, **special)
        ids, spans = written["input_ids"], [(start, end) for start, end in written["offset_mapping"]]
        spans = spans_before_replacing(prompt, mark, text, spans)
        videos = self.media_ids - {self.image_token_id}
        if ids.count(self.image_token_id) != len(pictures) or not videos.isdisjoint(ids):
            raise Unusable("text")  # the text itself contains the token of a picture or video
        if not pictures:
            return Encoded(ids, spans, {})
        try:
            given = self.processor(text=[prompt], images=[list(pictures)], return_tensors="pt", **special)
        except ValueError:  # such as a picture 200 times as wide as high
            raise Unusable("broken_picture") from None
        expanded = given["input_ids"][0].tolist()
        as_image = [self.image_token_id if token in self.inner_ids else token for token in expanded]
        spans = expanded_spans(ids, spans, as_image, self.image_token_id)
        return Encoded(expanded, spans, {name: given[name] for name in self.image_inputs})

    def prepare(self, conversation: Conversation, image_root: Path, max_length: int) -> Prepared:
        """Model inputs of a conversation, at most ``max_length`` tokens.

        A longer one is cut at its end, as in the published recipe, but never through a picture.

        Raises:
            Unusable: a picture is missing or broken, a picture or every answer would be cut, or the text has no ids.
            UserError: the file system does not let a picture be read.
        """
        pictures = self._open_pictures(conversation, image_root, max_length)
        segments = self.segments(conversation)
        encoded = self.encode("".join(segment.text for segment in segments), pictures)
        ids = torch.tensor(encoded.input_ids)  # [S]
        loss_mask = assistant_mask(segments, encoded.spans) & (ids != self.image_token_id)
        if (ids[max_length:] == self.image_token_id).any():
            raise Unusable("image_cut")
        if not loss_mask[:max_length].any():
            raise Unusable("answer_cut")
        return Prepared(conversation.id, ids[:max_length], loss_mask[:max_length], encoded.images)

    def request(self, prompts: Sequence[list[int]], images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Inputs of `generate` for conversations that wait for an answer, as the processor would give them.

        Args:
            prompts: ids of each, with one for each image feature.
            images: image inputs of the pictures in each.
        """
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])  # [B, S]
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        return {"input_ids": input_ids, "attention_mask": mask, **join_images(images)}

    def outline(self, conversation: Conversation, image_root: Path, max_length: int) -> PromptOutline:
        """The questions of a conversation, with the ids that they have whatever the answers are.

        Raises:
            Unusable: a picture is missing or broken, all of them are more than ``max_length`` tokens, the text has no
            ids, or the template changes answers.
        """
        pictures = self._open_pictures(conversation, image_root, max_length)
        questions = [question for question, _ in conversation.turns]
        blank = replace(conversation, turns=tuple((question, PLACEHOLDER) for question in questions), cut=frozenset())
        texts: list[str] = []  # question, placeholder, its end; and so on
        for segment in self.segments(blank):
            before, found, end = segment.text.rpartition(PLACEHOLDER) if segment.is_answer else (segment.text, "", "")
            if segment.is_answer and not found:
                raise Unusable("template")
            texts += [before + found, end] if segment.is_answer else [before]
        encoded = self.encode("".join(texts), pictures)
        parts: list[list[int]] = [[] for _ in texts]
        owners = part_of_each_token([len(text) for text in texts], encoded.spans)
        for token, part in zip(encoded.input_ids, owners, strict=True):
            parts[min(part, len(parts) - 1)].append(token)
        turns = [
            Turn(asked, end, question.count(MARK))
            for question, asked, end in zip(questions, parts[::3], parts[2::3], strict=True)
        ]
        return PromptOutline(conversation.id, tuple(turns), encoded.images)

    def _open_pictures(self, conversation: Conversation, root: Path, max_length: int) -> list[Image.Image]:
        if len(conversation.images) * self.least_picture_tokens > max_length:
            raise Unusable("image_cut")  # before thousands of them fill the memory
        return [open_picture(picture_path(root, name)) for name in conversation.images]


class PicturesFirstTemplate(Template):
    """A family whose image inputs cannot be divided between the pictures of a conversation. Answers are generated for
    conversations with all pictures in the first question."""

    def outline(self, conversation: Conversation, image_root: Path, max_length: int) -> PromptOutline:
        if any(MARK in question for question, _ in conversation.turns[1:]):
            raise Unusable("template")
        return super().outline(conversation, image_root, max_length)

    def first_pictures(self, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        return images if count else {}


def answer_parts(spoken: str, answer: str, cut: bool) -> list[Segment]:
    """What the assistant says, with the end token, as one part; without it if the answer is ``cut``.

    >>> answer_parts("Red and</s>", "Red and", cut=True)
    [Segment(text='Red and', is_answer=True), Segment(text='</s>', is_answer=False)]
    >>> answer_parts("s</s>", "s", cut=True)[0].text
    's'
    """
    if not cut:
        return [Segment(spoken, True)]
    if not answer.strip():
        return [Segment(spoken, False)]
    answer, start = answer.strip(), len(spoken) - len(spoken.lstrip())
    at = start if spoken.startswith(answer, start) else spoken.rfind(answer)  # behind an empty thought
    if at < 0:
        raise Unusable("template")
    end = at + len(answer)
    return [Segment(spoken[:end], True), Segment(spoken[end:], False)]


def join_images(images: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The image inputs of several conversations as those of a batch, joined along dimension 0; some may have none.

    Pictures with fewer tiles (LLaVA-1.6) or pixels (Mistral 3) than others of the batch are padded with zeros, as their
    processors do.
    """
    parts: dict[str, list[Tensor]] = {}
    for one in images:
        for name, value in one.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(_with_equal_sizes(values)) for name, values in parts.items()}


def _with_equal_sizes(values: list[Tensor]) -> list[Tensor]:
    """``values`` [P, ...], each padded to the largest size in every dimension behind the first."""
    sizes = [max(value.shape[axis] for value in values) for axis in range(1, values[0].ndim)]
    result = []
    for value in values:
        missing = [(0, size - own) for size, own in zip(sizes, value.shape[1:], strict=True)]
        result.append(F.pad(value, [each for pair in reversed(missing) for each in pair]))
    return result


def expanded_spans(written: Sequence[int], spans: Sequence[Span], expanded: Sequence[int], image: int) -> list[Span]:
    """Spans of the ids that a processor made of a prompt by repeating the id of each image mark.

    Args:
        written: ids of the prompt, one for each mark.
        spans: their characters.
        expanded: ids of the processor.
        image: the id that is repeated.

    Raises:
        Unusable: the processor has changed other ids.

    >>> expanded_spans([5, 9, 6], [(0, 1), (1, 8), (8, 9)], [5, 9, 9, 6], image=9)
    [(0, 1), (1, 8), (1, 8), (8, 9)]
    """
    result: list[Span] = []
    start = 0
    runs = [[(is_image, list(run)) for is_image, run in groupby(ids, image.__eq__)] for ids in (written, expanded)]
    if len(runs[0]) != len(runs[1]):
        raise Unusable("text")
    for (is_image, marks), (_, ids) in zip(*runs, strict=True):
        own = spans[start : start + len(marks)]
        start += len(marks)
        if is_image:  # of marks without text between them each gets an equal share
            result += [own[place * len(marks) // len(ids)] for place in range(len(ids))]
        elif ids == marks:
            result += own
        else:
            raise Unusable("text")
    return result


def spans_before_replacing(prompt: str, mark: str, text: str, spans: Sequence[Span]) -> list[Span]:
    """Characters of ``prompt`` for spans of the same prompt with each ``mark`` replaced by ``text``. What lies in the
    text is given the whole mark.

    >>> spans_before_replacing("a*b", "*", "<*>", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)])
    [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    """
    if mark == text:
        return list(spans)
    longer = len(text) - len(mark)
    pieces = accumulate(len(piece) for piece in prompt.split(mark)[:-1])
    marks = [length + number * len(mark) for number, length in enumerate(pieces)]  # where each begins in the prompt
    begins = [place + number * longer for number, place in enumerate(marks)]  # and after replacing

    def original(place: int, is_end: bool) -> int:
        number = (bisect_left if is_end else bisect_right)(begins, place) - 1  # the last mark that begins before
        if number < 0:
            return place
        if place < begins[number] + len(text) or (is_end and place == begins[number] + len(text)):
            return marks[number] + (len(mark) if is_end else 0)
        return place - (number + 1) * longer

    return [
        (original(start, False), original(end, True)) if end > start else (original(start, False),) * 2
        for start, end in spans
    ]


def part_of_each_token(lengths: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """For each token the part of the text in which its first character lies.

    Args:
        lengths: characters of each part.
        spans: characters of each token, in order.

    >>> part_of_each_token([2, 2], [(0, 0), (0, 2), (2, 3), (3, 4), (4, 4)])
    [0, 0, 1, 1, 2]
    """
    ends = list(accumulate(lengths))
    found, number = [], 0
    for start, _ in spans:
        while number < len(ends) and start >= ends[number]:
            number += 1
        found.append(number)
    return found


def assistant_mask(segments: Sequence[Segment], spans: Sequence[Span]) -> Tensor:
    """[S] bool: the tokens whose first character is the assistant's.

    >>> assistant_mask([Segment("ab", False), Segment("cd", True)], [(0, 0), (0, 2), (2, 3), (3, 4)]).tolist()
    [False, False, True, True]
    """
    parts = part_of_each_token([len(segment.text) for segment in segments], spans)
    mask = [
        end > start and part < len(segments) and segments[part].is_answer
        for (start, end), part in zip(spans, parts, strict=True)
    ]
    return torch.tensor(mask, dtype=torch.bool)


def mark_first(question: str) -> str:
    """Moves the mark of a single picture before the words, as in LLaVA's own training."""
    if question.count(MARK) != 1:
        return question
    return f"{MARK}\n{question.replace(MARK, '').strip()}".strip()

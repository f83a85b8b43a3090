"""From prompt and pictures to model inputs, exactly as LLaVA-1.5 does it.

`<image>` in a prompt marks a picture. The pieces of text between the marks are tokenised separately, with one
begin-of-sequence id in front; a mark becomes as many image ids as a picture has features, so that ids, embeddings and
hidden states have one length and `input_ids == image_token_id` is the image mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerFast

from .conversation import DEFAULT_TEMPLATE, get_template, write_turns
from .errors import UserError, reason_of
from .image import MAX_SQUARE_SIDE, ImageInput, load_image, pad_to_square

IMAGE_TOKEN = "<image>"
Aspect = Literal["pad", "crop"]


class LlavaProcessor:
    """Tokenizer and image processor of one checkpoint.

    Args:
        tokenizer: the Llama tokenizer.
        image_processor: a CLIP image processor that works on PIL pictures.
        image_token_id: id of an image feature's place in `input_ids`. Text never produces it.
        image_token_count: features of one picture.
        aspect: "pad" adds a border to make pictures square, "crop" keeps the centre.
        template: name of the conversation template of `chat_prompt`; None for the checkpoint's own, else Vicuna's.
        chat_template: the checkpoint's own chat template (Jinja), if it has one.
    """

    image_token = IMAGE_TOKEN

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_processor: Any,
        image_token_id: int,
        image_token_count: int,
        aspect: Aspect = "pad",
        template: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.image_token_count = image_token_count
        self.aspect = aspect
        self.template = template
        self.chat_template = chat_template
        self.pad_token_id = _pad_id(tokenizer, image_token_id)
        self._backend = _without_token(tokenizer.backend_tokenizer, image_token_id)
        begin = self._backend.encode("").ids
        self._begin = begin if begin == [tokenizer.bos_token_id] else []
        self._drops_space = self._ids(" a") == self._ids("a")

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageInput | Sequence[ImageInput] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Model inputs of one prompt or a batch of prompts.

        Args:
            text: prompts [B], with one `<image>` for each picture.
            images: pictures [n] in the order of the marks, over all prompts.
            return_tensors: only "pt".

        Returns:
            input_ids [B, S] and attention_mask [B, S] int64, padded on the left; with pictures also
            pixel_values [n, 3, h, w] float32.

        Raises:
            UserError: the numbers of marks and pictures differ, or a picture or a text cannot be used.
        """
        if return_tensors != "pt":
            raise UserError("return_tensors must be 'pt'", return_tensors)
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = _as_list(images)
        marks = sum(prompt.count(IMAGE_TOKEN) for prompt in prompts)
        if marks != len(pictures):
            raise UserError(f"prompt has {marks} {IMAGE_TOKEN} mark(s), but {len(pictures)} picture(s) were given")
        data = self._pad([self.encode(prompt) for prompt in prompts])
        if pictures:
            data["pixel_values"] = self.pixel_values(pictures)
        return BatchFeature(data)

    def encode(self, prompt: str) -> list[int]:
        """Ids of one prompt; each `<image>` becomes `image_token_count` image ids.

        Raises:
            UserError: the text has a character that the tokenizer can only write with the image id.
        """
        return self.encode_with_spans(prompt)[0]

    def encode_with_spans(self, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, and for each id the characters (start, end) of the prompt that it stands for: those of the mark
        for an image id, (0, 0) for the begin-of-sequence id.

        Raises:
            UserError: as `encode`.
        """
        ids, spans, offset = list(self._begin), [(0, 0)] * len(self._begin), 0
        for number, piece in enumerate(prompt.split(IMAGE_TOKEN)):
            if number:
                ids += [self.image_token_id] * self.image_token_count
                spans += [(offset, offset + len(IMAGE_TOKEN))] * self.image_token_count
                offset += len(IMAGE_TOKEN)
            lead = " " if self._drops_space and piece.startswith((" ", "\u2581")) else ""
            encoding = self._backend.encode(lead + piece, add_special_tokens=False)
            if self.image_token_id in encoding.ids:
                raise UserError("prompt has characters the tokenizer does not know", piece.strip()[:60])
            ids += encoding.ids
            shift = offset - len(lead)
            spans += [(max(start + shift, offset), max(end + shift, offset)) for start, end in encoding.offsets]
            offset += len(piece)
        return ids, spans

    def pixel_values(self, images: Sequence[ImageInput]) -> torch.Tensor:
        """Pictures [n] to normalised pixels [n, 3, h, w] float32."""
        prepared = [self._shape(load_image(image)) for image in images]
        return self.image_processor(prepared, return_tensors="pt")["pixel_values"]  # [n, 3, h, w]

    def chat_prompt(
        self,
        question: str,
        num_images: int = 0,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
        template: str | None = None,
    ) -> str:
        """Prompt of a question in the conversation template.

        Args:
            question: what the user asks. Without `<image>` marks of its own, the pictures come first.
            num_images: pictures that belong to this question.
            history: earlier (question, answer) turns; a question keeps the `<image>` marks it has.
            system: system prompt instead of the template's.
            template: name of a template instead of the processor's.

        Raises:
            UserError: the question has marks, but not `num_images`; there is no such template; or the checkpoint's own
                cannot write the conversation.
        """
        marks = question.count(IMAGE_TOKEN)
        if marks not in (0, num_images):
            raise UserError(f"question has {marks} {IMAGE_TOKEN} mark(s), but {num_images} picture(s) belong to it")
        if not marks:
            question = f"{IMAGE_TOKEN}\n" * num_images + question
        return self.write_turns([*history, (question, None)], system, template)

    def write_turns(
        self, turns: Sequence[tuple[str, str | None]], system: str | None = None, template: str | None = None
    ) -> str:
        """Turns (question, answer) as text; an answer None leaves the last turn open. Other arguments and errors as of
        `chat_prompt`."""
        name = template or self.template
        if name is None and self.chat_template is not None:
            return self._write_own(turns, system)
        return write_turns(turns, system, name or DEFAULT_TEMPLATE, self.end_of_answer)

    @property
    def end_of_answer(self) -> str | None:
        """The end token, if the vocabulary lacks the one that Vicuna's conversation writes."""
        lacks = self._backend.token_to_id(get_template().sep2) is None
        return self.tokenizer.eos_token if lacks else None

    def _write_own(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        """The conversation in the checkpoint's own template, without the begin token that `encode` puts there."""
        in_parts = self._template_takes_parts

        def content(text: str, marks: bool = False) -> Any:
            return _parts(text, marks) if in_parts else text

        is_open = bool(turns) and turns[-1][1] is None
        messages = [] if system is None else [{"role": "system", "content": content(system)}]
        for question, answer in turns:
            messages.append({"role": "user", "content": content(question, marks=True)})
            if answer is not None:
                messages.append({"role": "assistant", "content": content(answer)})
        written = self._render(messages, is_open)
        return written.removeprefix(self.tokenizer.bos_token) if self._begin else written

    @cached_property
    def _template_takes_parts(self) -> bool:
        """Whether the template expects messages of parts, as those of processors do, and not of text."""
        try:
            written = self._render([{"role": "user", "content": _parts(f"{IMAGE_TOKEN}probe", True)}], True)
        except UserError:
            return False
        return IMAGE_TOKEN in written and "probe" in written and "'probe'" not in written

    def _render(self, messages: list[dict[str, Any]], is_open: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=is_open
            )
        except Exception as error:  # a template is a program: it may divide by zero
            raise UserError(f"chat template cannot write this conversation ({reason_of(error)})") from error

    def decode(self, ids: Any, skip_special_tokens: bool = True, **options: Any) -> str:
        """Text of ids [S]."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **options)

    def batch_decode(self, ids: Any, skip_special_tokens: bool = True, **options: Any) -> list[str]:
        """Texts of ids [B, S]."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens, **options)

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _shape(self, image: Image.Image) -> Image.Image:
        if self.aspect == "pad":
            red, green, blue = (int(mean * 255) for mean in self.image_processor.image_mean)
            return pad_to_square(image, (red, green, blue))
        edge = max(dict(self.image_processor.crop_size).values())
        if edge * max(image.size) > MAX_SQUARE_SIDE * min(image.size):
            raise UserError("picture too long for its width", f"{image.width} x {image.height}", "crop it")
        return image

    def _pad(self, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        length = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), length), self.pad_token_id)  # [B, S]
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, length - len(row) :] = torch.tensor(row)
            mask[index, length - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _parts(text: str, marks: bool) -> list[dict[str, str]]:
    """A message as chat templates of processors read it; with `marks`, each `<image>` is a picture.

    >>> _parts("<image>\\nWhat?", marks=True)
    [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    """
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_TOKEN) if marks else [text]):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece.strip() or not marks:
            parts.append({"type": "text", "text": piece})
    return parts


def _as_list(images: ImageInput | Sequence[ImageInput] | None) -> list[ImageInput]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]


def _pad_id(tokenizer: PreTrainedTokenizerFast, image_token_id: int) -> int:
    """A padding id other than the image id, which liuhaotian uses for both."""
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if index is not None and index != image_token_id:
            return index
    raise UserError("tokenizer has no token to pad with")


def _without_token(backend: Tokenizer, index: int) -> Tokenizer:
    """A copy that treats the text of token `index` (such as `<unk>` in a question) as plain text."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] != index]
    return Tokenizer.from_str(json.dumps(state))

"""From prompt and pictures to model inputs, exactly as LLaVA-1.5 does it.

`<image>` in a prompt marks a picture. The pieces of text between the marks are tokenised separately, with one
begin-of-sequence id in front; a mark becomes as many image ids as a picture has features, so that ids, embeddings and
hidden states have one length and `input_ids == image_token_id` is the image mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerFast

from .conversation import DEFAULT_TEMPLATE, build_prompt
from .errors import UserError
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
        template: conversation template of `chat_prompt`.
    """

    image_token = IMAGE_TOKEN

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_processor: Any,
        image_token_id: int,
        image_token_count: int,
        aspect: Aspect = "pad",
        template: str = DEFAULT_TEMPLATE,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.image_token_count = image_token_count
        self.aspect = aspect
        self.template = template
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
            UserError: the question has marks, but not `num_images`; or there is no such template.
        """
        marks = question.count(IMAGE_TOKEN)
        if marks not in (0, num_images):
            raise UserError(f"question has {marks} {IMAGE_TOKEN} mark(s), but {num_images} picture(s) belong to it")
        if not marks:
            question = f"{IMAGE_TOKEN}\n" * num_images + question
        return build_prompt(question, history, system, template or self.template)

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

"""From prompt and pictures to model inputs, exactly as LLaVA-1.5 does it.

`<image>` in a prompt marks a picture. The pieces of text between the marks are tokenised separately, with one
begin-of-sequence id in front; a mark becomes as many image ids as a picture has features, so that ids, embeddings and
hidden states have one length and `input_ids == image_token_id` is the image mask.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from .batching import EncodedPrompt, as_tensors, make_batch
from .conversation import DEFAULT_TEMPLATE, get_template, write_turns
from .errors import UserError, reason_of
from .image import MAX_SQUARE_SIDE, ImageInput, is_of_floats, load_image, pad_to_square
from .inputs import check_text
from .messages import IMAGE_TOKEN, WRITTEN_MARK, as_text, check_written, parts_of, read_message
from .options import CALL_OPTIONS, PictureOptions, read_options
from .processor_files import read_processor

Aspect = Literal["pad", "crop"]

UNWRITABLE = "\U0010fffd\U0010fffd"
"""Stands for the image token where a text cannot mean it: characters that no text has."""


class LlavaProcessor(ProcessorMixin):
    """Tokenizer and image processor of one checkpoint, called as transformers' own processors are.

    `save_pretrained` and `from_pretrained` work as in transformers. `AutoProcessor` reads what was saved as
    transformers' own `LlavaProcessor`, which needs a vocabulary with `<image>` and always crops pictures.

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
        super().__init__(tokenizer=tokenizer, image_processor=image_processor, chat_template=chat_template)
        self.image_token_id = image_token_id
        self.image_token_count = image_token_count
        self.aspect = aspect
        self.template = template
        self.pad_token_id = _pad_id(tokenizer, image_token_id)
        self._backend = _without_token(tokenizer.backend_tokenizer, image_token_id)
        begin = self._backend.encode("").ids
        self._begin = begin if begin == [tokenizer.bos_token_id] else []
        self._drops_space = self._ids(" a") == self._ids("a")
        self._parts_known: dict[str, bool] = {}

    @classmethod
    def from_pretrained(cls, path: Any, **hub: Any) -> LlavaProcessor:
        """The processor of a checkpoint of either layout, or of a folder that `save_pretrained` wrote; as
        `llava.load_processor`."""
        return cls(**read_processor(path, **hub))

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes, with the numbers by which transformers' own class counts image tokens."""
        side = math.isqrt(self.image_token_count)
        extra = self.image_token_count - side**2
        crop = max(dict(self.image_processor.crop_size).values())
        return super().to_dict() | {
            "image_token": IMAGE_TOKEN,
            "patch_size": crop // side,
            "vision_feature_select_strategy": "full" if extra else "default",
            "num_additional_image_tokens": 1,
        }

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: ImageInput | Sequence[Any] | None = None,
        videos: None = None,
        audio: None = None,
        **options: Any,
    ) -> BatchFeature:
        """Model inputs of one prompt or a batch of prompts.

        Args:
            text: prompts [B], with one `<image>` for each picture. None for pixel values alone. Without names of
                arguments, text and images may also come in transformers' order.
            images: pictures [n] in the order of the marks, over all prompts; or a list of pictures for each prompt.
            options: see `llava.options`. Unlike transformers' processors, the default is padded torch tensors.

        Returns:
            input_ids [B, S] and attention_mask [B, S] int64; with pictures also pixel_values [n, 3, h, w] float32.

        Raises:
            UserError: the numbers of marks and pictures differ, a picture or a text cannot be used, or an option is
                unknown.
        """
        if videos is not None or audio is not None:
            raise UserError("LLaVA reads no videos and no sound", fix="leave them out")
        texts, shaping = read_options(options)
        if _are_swapped(text, images):
            text, images = images, text
        pictures = list(flat_pictures(images))
        data: dict[str, Any] = {}
        if text is not None:
            if not _is_text(text):
                raise UserError("text is not a text or a list of texts", fix="call processor(text=..., images=...)")
            prompts = [text] if isinstance(text, str) else list(text)
            if not prompts:
                raise UserError("empty list of texts", fix="give at least one")
            _check_marks(prompts, images, len(pictures))
            rows = [self._encoded(prompt, texts.add_special_tokens, in_expanded_text=True) for prompt in prompts]
            data |= make_batch(rows, texts, self.tokenizer, self.pad_token_id, self.image_token_id)
        elif not pictures:
            raise UserError("neither text nor images", fix="call processor(text=..., images=...)")
        if pictures:
            data["pixel_values"] = as_tensors(self.pixel_values(pictures, shaping), texts.return_tensors)
        return BatchFeature(data)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Messages in the conversation template, as text or as model inputs.

        Args:
            conversation: messages ``{"role", "content"}``, or a list of such lists. A content is a text, in which
                `<image>` of a user is a picture, or a list of parts: ``{"type": "text", "text"}``;
                ``{"type": "image"}`` with the picture as ``image``, ``url``, ``path`` or ``base64``; or OpenAI's
                ``image_url``.
            chat_template: a Jinja template instead of the processor's.
            add_generation_prompt: ends with the beginning of an answer.
            tokenize: returns ``input_ids``, or all model inputs with ``return_dict``.
            processor_kwargs: options of `__call__`; they may be among ``options`` too. Other ``options`` are variables
                of the template.

        Raises:
            UserError: a message has another form, the template cannot write it, or as `__call__`.
        """
        many = bool(conversation) and isinstance(conversation[0], list | tuple)
        call = {name: options.pop(name) for name in list(options) if name in CALL_OPTIONS}
        texts, pictures = [], []
        for messages in conversation if many else [conversation]:
            read = [read_message(message) for message in messages]
            turns = [(role, text) for role, text, _ in read]
            texts.append(self._write_messages(turns, chat_template, add_generation_prompt, options))
            pictures += [each for *_, own in read for each in own]
        if not tokenize:
            return texts if many else texts[0]
        call = {"images": pictures or None, **call, **(processor_kwargs or {})}
        inputs = self(text=[self._without_begin(text) for text in texts], **call)
        return inputs if return_dict else inputs["input_ids"]

    def _write_messages(
        self, turns: Sequence[tuple[str, str]], template: str | None, is_open: bool, options: Mapping[str, Any]
    ) -> str:
        """Turns (role, text with marks) in a Jinja template, else in LLaVA's conversation."""
        template = template or (None if self.template else self.chat_template)
        if template is not None:
            in_parts = self._takes_parts(template)
            messages = [
                {"role": role, "content": parts_of(text, role == "user") if in_parts else text} for role, text in turns
            ]
            written = self._render(messages, is_open, template, **options)
            check_written(written, [text for role, text in turns if role == "system"])
            return written
        if options:
            raise UserError(f"unknown option '{next(iter(options))}'", fix="this processor has no Jinja template")
        system = [text for role, text in turns if role == "system"]
        conversation = get_template(self.template or DEFAULT_TEMPLATE, "\n".join(system) if system else None)
        conversation.sep2 = self.end_of_answer or conversation.sep2
        for role, text in turns:
            if role != "system":
                conversation.append(role == "assistant", text)
        if is_open:
            conversation.append(1, None)
        return conversation.prompt()

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
        encoded = self._encoded(prompt)
        return encoded.ids, encoded.spans

    def _encoded(self, prompt: str, begins: bool = True, in_expanded_text: bool = False) -> EncodedPrompt:
        """A prompt as ids. The spans are of the prompt, or of its text with each mark repeated for each image id."""
        check_text(prompt, "prompt")
        ids = list(self._begin) if begins else []
        spans, offset = [(0, 0)] * len(ids), 0
        step = len(IMAGE_TOKEN) if in_expanded_text else 0
        for number, piece in enumerate(prompt.split(IMAGE_TOKEN)):
            if number:
                ids += [self.image_token_id] * self.image_token_count
                starts = [offset + step * place for place in range(self.image_token_count)]
                spans += [(start, start + len(IMAGE_TOKEN)) for start in starts]
                offset = spans[-1][1]
            piece = piece.replace(WRITTEN_MARK, IMAGE_TOKEN)
            lead = " " if self._drops_space and piece.startswith((" ", "\u2581")) else ""
            encoding = self._backend.encode(lead + piece, add_special_tokens=False)
            if self.image_token_id in encoding.ids:
                raise UserError("prompt has characters the tokenizer does not know", piece.strip()[:60])
            ids += encoding.ids
            shift = offset - len(lead)
            spans += [(max(start + shift, offset), max(end + shift, offset)) for start, end in encoding.offsets]
            offset += len(piece)
        return EncodedPrompt(ids, spans, len(self._begin) if begins else 0)

    def pixel_values(self, images: Sequence[ImageInput], options: PictureOptions | None = None) -> torch.Tensor:
        """Pictures [n] to normalised pixels [n, 3, h, w] float32.

        Raises:
            UserError: a picture cannot be used, or the options give pixels of another size than the model reads.
        """
        options = options or PictureOptions()
        if options.do_rescale is False and any(is_of_floats(image) for image in images):
            raise UserError("do_rescale=False with an array of floats", fix="leave it out: 0 to 1 is known as scaled")
        mean = options.image_mean or self.image_processor.image_mean
        loaded = [load_image(image, channels=options.input_data_format) for image in images]
        settings = options.of_processor()
        try:
            prepared = [self._shape(image, mean) for image in loaded]
            pixels = self.image_processor(prepared, return_tensors="pt", **settings)["pixel_values"]  # [n, 3, h, w]
        except (UserError, MemoryError, OSError):
            raise
        except Exception as error:  # what the settings say decides what is raised
            whose = "these options" if settings else "its own settings"
            raise UserError(
                f"image processor cannot use {whose} ({reason_of(error)})", ", ".join(settings) or None
            ) from None
        side = dict(self.image_processor.crop_size)
        if settings and pixels.shape[2:] != (side["height"], side["width"]):
            found, wanted = f"{pixels.shape[2]} x {pixels.shape[3]}", f"{side['height']} x {side['width']}"
            raise UserError(f"pixels of {found}, but the model reads {wanted}", ", ".join(settings), "leave them out")
        return pixels

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
            history: earlier (question, answer) turns; a question keeps the `<image>` marks it has, in an answer they
                are text.
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
        turns = [*((asked, as_text(answer)) for asked, answer in history), (question, None)]
        return self.write_turns(turns, None if system is None else as_text(system), template)

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
        messages = [] if system is None else [("system", system)]
        for question, answer in turns:
            messages.append(("user", question))
            if answer is not None:
                messages.append(("assistant", answer))
        is_open = bool(turns) and turns[-1][1] is None
        return self._without_begin(self._write_messages(messages, self.chat_template, is_open, {}))

    def _without_begin(self, text: str) -> str:
        """A prompt without the begin token that `encode` puts there."""
        return text.removeprefix(self.tokenizer.bos_token) if self._begin else text

    def _takes_parts(self, template: str) -> bool:
        """Whether a template expects messages of parts, as those of processors do, and not of text."""
        if template not in self._parts_known:
            probe = [{"role": "user", "content": parts_of(f"{IMAGE_TOKEN}probe", True)}]
            try:
                written = self._render(probe, True, template)
            except UserError:
                written = ""
            takes = IMAGE_TOKEN in written and "probe" in written and "'probe'" not in written
            self._parts_known[template] = takes
        return self._parts_known[template]

    def _render(self, messages: list[dict[str, Any]], is_open: bool, template: str, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=is_open, **options
            )
        except Exception as error:  # a template is a program: it may divide by zero
            raise UserError(f"chat template cannot write this conversation ({reason_of(error)})") from error

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _shape(self, image: Image.Image, mean: float | Sequence[float]) -> Image.Image:
        if self.aspect == "pad":
            means = [mean] * 3 if isinstance(mean, int | float) else mean
            red, green, blue = (int(each * 255) for each in means)
            return pad_to_square(image, (red, green, blue))
        edge = max(dict(self.image_processor.crop_size).values())
        if edge * max(image.size) > MAX_SQUARE_SIDE * min(image.size):
            raise UserError("picture too long for its width", f"{image.width} x {image.height}", "crop it")
        return image


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(each, str) for each in value))


def _are_swapped(text: Any, images: Any) -> bool:
    """Whether the arguments came in the order of transformers' processors, pictures first."""
    if text is None:
        return False
    if _is_text(text):  # a prompt, or the path of a picture
        return _is_text(images) and IMAGE_TOKEN in "".join(images) and IMAGE_TOKEN not in "".join(text)
    return _is_text(images) or not any(isinstance(each, str) for each in flat_pictures(text))


def flat_pictures(images: Any) -> Iterator[ImageInput]:
    """The pictures in a picture, an array of pictures [n, ...], or lists of these; None is no picture."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        for image in images:
            yield from flat_pictures(image)
    elif images is not None:
        yield images


def _check_marks(prompts: Sequence[str], images: Any, count: int) -> None:
    """Raises `UserError` if marks and pictures differ in number; by prompt, where each has its own list."""
    marks = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    nested = isinstance(images, list | tuple) and any(isinstance(each, list | tuple) for each in images)
    pairs = [(sum(marks), count)]
    if nested and len(images) == len(prompts):
        pairs = [(own, len(list(flat_pictures(each)))) for own, each in zip(marks, images, strict=True)]
    for wanted, found in pairs:
        if wanted != found:
            raise UserError(f"prompt has {wanted} {IMAGE_TOKEN} mark(s), but {found} picture(s) were given")


def _pad_id(tokenizer: PreTrainedTokenizerFast, image_token_id: int) -> int:
    """A padding id other than the image id, which liuhaotian uses for both."""
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if index is not None and index != image_token_id:
            return index
    raise UserError("tokenizer has no token to pad with")


def _without_token(backend: Tokenizer, index: int) -> Tokenizer:
    """A copy that treats the text of token `index` (such as `<unk>` in a question) as plain text.

    A token behind the model's vocabulary is renamed, not removed: the ids of the tokens added after it are counted from
    the vocabulary.
    """
    state = json.loads(backend.to_str())
    vocabulary = backend.get_vocab_size(with_added_tokens=False)
    tokens = []
    for token in state["added_tokens"]:
        if token["id"] != index:
            tokens.append(token)
        elif index >= vocabulary:
            tokens.append({**token, "content": UNWRITABLE})
    state["added_tokens"] = tokens
    return Tokenizer.from_str(json.dumps(state))

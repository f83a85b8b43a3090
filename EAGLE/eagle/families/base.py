"""The target model as the decoder uses it. The subclass of a family says how a prompt is embedded, which positions it
has, and how a conversation is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from eagle.attention import TwoParts, takes_two_parts, with_tree_attention
from eagle.drafts.modules import capped
from eagle.families.layers import FULL, LINEAR, SLIDING, attention_layers, position_limit
from eagle.families.streams import StreamReader, Streams
from eagle.kv_cache import KVCache
from eagle.weight_layout import to_input_major_layout
from llava.errors import UserError
from llava.generation import checked_settings
from llava.strict import shown

MASKED_ATTENTION = ("sdpa", "eager")
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
LayerMasks = Tensor | dict[str, Tensor | None]
"""A mask for all layers, or one for each type of layer."""


class Media(NamedTuple):
    """A kind of media in a prompt.

    ``name``: as in transformers' ``get_<name>_features``; ``token``: the config's name for the id at the place of each
    feature; ``inputs``: the model inputs that are encoded.
    """

    name: str
    token: str
    inputs: tuple[str, ...]


class PromptEmbeds(NamedTuple):
    """Prompts as the text model reads them.

    ``embeds`` [B, S, H] input embeddings, with the projected features of pictures and videos in place; ``image_mask``
    [B, S] bool, true at these; ``deepstack``: [I, H] each, in prompt order, what the first text layers add to the
    hidden states there (DeepStack, arXiv 2406.04334); ``per_layer`` [B, S, layers, D] what each text layer reads of the
    tokens itself.
    """

    embeds: Tensor
    image_mask: Tensor
    deepstack: tuple[Tensor, ...] = ()
    per_layer: Tensor | None = None

    def sequence(self, index: int, keep: Tensor | slice) -> PromptEmbeds:
        """One sequence, [1, its own length]. ``keep`` [S] bool: its tokens, without the padding."""
        before, own = int(self.image_mask[:index].sum()), int(self.image_mask[index].sum())
        return PromptEmbeds(
            self.embeds[index : index + 1, keep],
            self.image_mask[index : index + 1, keep],
            tuple(features[before : before + own] for features in self.deepstack),
            None if self.per_layer is None else self.per_layer[index : index + 1, keep],
        )


class Prefill(NamedTuple):
    """The target's view of a prompt.

    ``hidden`` [B, S, H] after the final norm; ``embeds`` [B, S, H] input embeddings, with the projected image features
    at the image tokens; ``image_mask`` [B, S] bool; ``positions`` position ids [B, S], or [3, B, S] with M-RoPE;
    ``next_position`` [B] position id of the token after the prompt; ``streams`` [B, S, n * H] the streams that enter
    chosen layers, joined, if they were asked for.
    """

    hidden: Tensor
    embeds: Tensor
    image_mask: Tensor
    positions: Tensor
    next_position: Tensor
    streams: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """[B, S, F] what a draft reads of the target: the chosen streams, or ``hidden``."""
        return self.hidden if self.streams is None else self.streams


class Target(ABC):
    """A transformers model and its processor.

    ``family``: name of the family in `eagle.families.registry`. ``media``: the kinds of media that its prompts may
    have. ``text_types``: text models of this family alone, beside those of `eagle.families.layers`. Positions are 0, 1,
    2, … unless the family's class says otherwise. ``caps_logits``: the stock model applies its text config's
    ``final_logit_softcapping``. ``stop_strings``: those of the checkpoint's
    generation config, from which they are removed: transformers makes no criterion of them for ``custom_generate``.
    ``placement``: says on which device it was loaded and why, if the caller left that open.
    """

    family: ClassVar[str]
    media: ClassVar[tuple[Media, ...]] = (Media("image", "image_token_id", ("pixel_values",)),)
    text_types: ClassVar[tuple[str, ...]] = ()
    caps_logits: ClassVar[bool] = False
    placement: str = ""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        check_attention(model.config.get_text_config()._attn_implementation)
        self.layers = attention_layers(model.config.get_text_config(), self.text_types)
        self.model = model.eval()
        name = f"generation config of {model.config.name_or_path}"
        for key, value in checked_settings(vars(model.generation_config), name, self.vocab_size).items():
            setattr(model.generation_config, key, value)
        texts = model.generation_config.stop_strings or ()
        self.stop_strings = (texts,) if isinstance(texts, str) else tuple(texts)
        model.generation_config.stop_strings = None
        self.processor = processor
        if processor is not None:
            check_vision(model.config)
            for media in self.media:
                check_media_token(media, self)
        self._streams = StreamReader()

    def streams(self, layers: Sequence[int]) -> AbstractContextManager[Streams]:
        """Records what enters the given layers in this thread's forwards of the text model, while it is open. See
        `eagle.families.streams`."""
        return self._streams.open(self.text_model, layers)

    def reader_with_streams(self, read: Callable[..., Tensor], layers: Sequence[int]) -> Callable[..., Any]:
        """``read``, a forward of the text model, as a function that may be compiled. It returns what ``read`` does, and
        the streams of the layers, joined; None without layers."""
        reader = self._streams
        reader.attach(self.text_model, layers)

        def with_streams(*arguments: Any) -> tuple[Tensor, Tensor | None]:
            if not layers:
                return read(*arguments), None
            if not torch.compiler.is_compiling():
                with self.streams(layers) as streams:
                    output = read(*arguments)
                return output, streams.joined()
            reader.traced = []
            output = read(*arguments)
            found = {index: stream for index, stream in reader.traced}  # noqa: C416
            reader.traced = None
            return output, torch.cat([found[index] for index in layers], dim=-1)

        return with_streams

    @classmethod
    @abstractmethod
    def load(cls, path: str, **kwargs: Any) -> Target:
        """Loads model and processor. ``kwargs``: ``dtype``, ``device_map``, hub and quantisation settings.

        Raises:
            UserError: one of them cannot be loaded.
        """

    def embed_prompt(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> PromptEmbeds:
        """Encodes the pictures and videos of prompts [B, S], with one id for each feature.

        Raises:
            UserError: the prompts have places for another number of features.
        """
        image_mask = self.image_mask(input_ids, inputs)
        # an id of media may lie outside of the vocabulary
        embeds = self.model.get_input_embeddings()(input_ids.masked_fill(image_mask, 0))  # [B, S, H]
        for media in self.media:
            given = {name: inputs.get(name) for name in media.inputs}
            encoded = encode_media(self.model, inputs, media.name, **given)
            mask = self.media_mask(media, input_ids, inputs)
            embeds = place_features(embeds, mask, None if encoded is None else joined_features(encoded.pooler_output))
        return PromptEmbeds(embeds, image_mask)

    def image_mask(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """[B, S] bool: the places of all features."""
        return torch.stack([self.media_mask(media, input_ids, inputs) for media in self.media]).any(dim=0)

    def media_mask(self, media: Media, input_ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """[B, S] bool: the places of features of this kind."""
        mask = input_ids == getattr(self.config, media.token)
        if inputs.get("attention_mask") is not None:
            mask &= inputs["attention_mask"].bool()  # padding may use the same id
        return mask

    def prompt_positions(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Position ids as the family's text model takes them, and ``next_position`` [B]."""
        attention_mask = inputs.get("attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)  # [B, S]
        return positions, positions.amax(dim=-1) + 1

    def text_positions(self, positions: Tensor) -> Tensor:
        """Position ids [B, N] of text tokens in the form that the family's text model takes."""
        return positions

    def token_reader(self) -> Callable[[Tensor], dict[str, Tensor]]:
        """What the text model is given for generated tokens [B, N]."""
        embed = self.model.get_input_embeddings()
        return lambda tokens: {"inputs_embeds": embed(tokens)}

    def read_prompt(self, prompt: PromptEmbeds, positions: Tensor, **arguments: Any) -> Tensor:
        """The text model's forward over prompts.

        Args:
            positions: as `prompt_positions` gives them.
            arguments: of the text model: its cache, and ``attention_mask`` [B, S] of padded prompts.

        Returns:
            [B, S, H] hidden states after the final norm.
        """
        return self.text_model(inputs_embeds=prompt.embeds, position_ids=positions, **arguments).last_hidden_state

    @property
    @abstractmethod
    def image_mark(self) -> str:
        """What a prompt has in the place of a picture."""

    @abstractmethod
    def prepare(self, prompt: str | Sequence[str], images: Sequence[Any] = ()) -> dict[str, Any]:
        """Model inputs of one prompt or several and their images, padded on the left, on the model's device.

        Raises:
            UserError: the prompts mention another number of images than were given, or an image cannot be read.
        """

    @abstractmethod
    def chat_prompt(
        self, question: str, num_images: int = 0, history: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> str:
        """The family's conversation template around a question; ``history``: (question, answer) pairs before it. The
        pictures stand in the first question."""

    def complete_inputs(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs that transformers' `generate` needs beside ``inputs``, derived from ``input_ids`` [B, P]."""
        return {}

    def check_length(self, inputs: Mapping[str, Any], new_tokens: int = 0, where: str | None = None) -> None:
        """Compares prompts and ``new_tokens`` after them with the positions that the model is made for.

        Args:
            inputs: as `prepare` returns them.
            where: names the prompt in the error.

        Raises:
            UserError: they are too long.
        """
        input_ids, limit = inputs["input_ids"], position_limit(self.config.get_text_config())
        if limit is None or input_ids.shape[1] + new_tokens <= limit:  # a token has at most one position of its own
            return
        needed = int(self.prompt_positions(input_ids, inputs)[1].max())
        if needed >= limit:
            raise UserError(f"prompt of {needed} positions for a model of {limit}", where, "shorten the prompt")
        if needed + new_tokens > limit:
            what = f"prompt of {needed} positions and {new_tokens} new tokens for a model of {limit} positions"
            raise UserError(what, where, f"ask for at most {limit - needed} new tokens")

    @property
    def text_model(self) -> Any:
        """The stock text model: embeddings in, hidden states after the final norm out."""
        return self.model.model.language_model

    @cached_property
    def cache_argument(self) -> str:
        """What the text model calls its cache: `cache` in newer releases of transformers."""
        known = signature(type(self.text_model).forward).parameters
        return "cache" if "cache" in known else "past_key_values"

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().out_features

    @property
    def device(self) -> torch.device:
        """Device of prompts and drafted tokens: that of the token embedding."""
        return self.model.get_input_embeddings().weight.device

    @property
    def head_device(self) -> torch.device:
        """Device of the logits: that of ``lm_head``. Differs from `device` where a model is spread over several."""
        return self.model.get_output_embeddings().weight.device

    def synchronize(self) -> None:
        """Waits for all devices of the model."""
        for device in {parameter.device for parameter in self.model.parameters()}:
            if device.type not in ("cpu", "meta"):
                torch.accelerator.synchronize(device)

    @property
    def offloaded(self) -> bool:
        """Whether accelerate keeps weights that each cycle needs on the disk or in CPU memory."""
        parts = (self.text_model, self.model.get_output_embeddings())
        return any(weight.is_meta for part in parts for weight in part.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End tokens, as the checkpoint's generation config (else its config) gives them."""
        for config in (self.model.generation_config, self.config.get_text_config(), self.config):
            eos = getattr(config, "eos_token_id", None)
            if eos is not None:
                return tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        return ()

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """Heads of keys and values, and the size of each, by layer."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return [(heads, size)] * len(self.text_model.layers)

    def prepare_for_decoding(self) -> None:
        """Arranges the weights that verification multiplies with (`eagle.weight_layout`); once, after loading."""
        embedding = self.model.get_input_embeddings().weight
        for part in (self.text_model, self.model.get_output_embeddings()):
            to_input_major_layout(part, skip=[embedding])

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of ``capacity`` rows for each of ``batch`` sequences, with each layer on its own device."""
        devices = [next(layer.parameters()).device for layer in self.text_model.layers]
        return KVCache.allocate(devices, batch, self.cache_shapes, capacity, self.dtype, self.new_states(batch))

    def new_states(self, batch: int) -> dict[int, Any]:
        """Empty states of the layers that have no cached rows, by layer."""
        return {}

    @property
    def verifies_trees(self) -> bool:
        """False if only a chain of drafted tokens can be verified in one forward."""
        return not self.layers.linear

    def prefill(self, inputs: Mapping[str, Any], layers: Sequence[int] = ()) -> Prefill:
        """One forward over prompts, without a cache.

        Args:
            inputs: ``input_ids`` [B, S] with one id per image feature, ``attention_mask`` [B, S] if sequences are
                padded, and the family's image inputs.
            layers: whose input streams are returned too.
        """
        input_ids = inputs["input_ids"]
        prompt = self.embed_prompt(input_ids, inputs)
        positions, next_position = self.prompt_positions(input_ids, inputs)
        attention_mask = inputs.get("attention_mask")
        with self.streams(layers) as streams:
            hidden = self.read_prompt(prompt, positions, attention_mask=attention_mask, use_cache=False)
        return Prefill(hidden, prompt.embeds, prompt.image_mask, positions, next_position, streams.joined())

    def prefill_each(self, inputs: Mapping[str, Any], cache: KVCache, layers: Sequence[int] = ()) -> Iterator[Prefill]:
        """Fills the cache, one sequence after the other and without their padding, so that each is read exactly as it
        would be alone. The pictures of all sequences are encoded together.

        Args:
            inputs: as for `prefill`; padding may be on either side.
            cache: an empty one for these sequences.
            layers: whose input streams are returned too.

        Yields:
            The `Prefill` of each sequence, [1, its own length].
        """
        input_ids = inputs["input_ids"]
        prompts = self.embed_prompt(input_ids, inputs)
        positions, next_position = self.prompt_positions(input_ids, inputs)
        attention_mask = inputs.get("attention_mask")
        check_position_ids(inputs.get("position_ids"), positions, attention_mask)
        check_token_types(self, input_ids, inputs)
        lengths = []
        for index in range(input_ids.shape[0]):
            keep = slice(None) if attention_mask is None else attention_mask[index].bool()
            prompt = prompts.sequence(index, keep)
            own_positions = positions[..., index : index + 1, :][..., keep]
            own_next = next_position[index : index + 1]
            if prompt.image_mask[0, -1] and (own_positions[..., -1] + 1 != own_next).any():
                # transformers continues from the three numbers of the last token
                raise UserError("a prompt ends with a picture or video", fix="write some text behind it")
            part = cache.sequence(index)
            with self.streams(layers) as streams:
                hidden = self.read_prompt(prompt, own_positions, use_cache=True, **{self.cache_argument: part})
            lengths.append(part.length)
            yield Prefill(hidden, prompt.embeds, prompt.image_mask, own_positions, own_next, streams.joined())
        cache.truncate(lengths)

    def masks_by_layer(self, mask: Tensor, past: Sequence[int] | Tensor, depths: Tensor) -> LayerMasks:
        """What the text model takes as mask of a tree forward: a mask for each type of layer if it has sliding windows.

        Args:
            mask: [B, 1, N, T] additive, of layers that see everything.
            past: cached rows of each sequence; [B] if the host does not know them.
            depths: [B, N] of the nodes.
        """
        if self.layers.linear:
            return {FULL: mask, LINEAR: None}
        if self.layers.window is None:
            return mask
        sliding = within_window(mask, past, depths, self.layers.window)
        return {FULL: mask, SLIDING: sliding} if self.layers.by_type else sliding

    @property
    def takes_two_parts(self) -> bool:
        """Whether `verify` can attend to the cached rows without the mask (`eagle.attention`)."""
        return takes_two_parts(self.text_model)

    def verify(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: LayerMasks | None,
        cache: KVCache,
        two_parts: TwoParts | None = None,
    ) -> Tensor:
        """One forward over the nodes of a tree, appended to the cache.

        Args:
            tokens: [B, N] ids in node order.
            positions: [B, N] position id of each node.
            mask: [B, 1, N, longest past + N] additive, by type of layer if the model has several (`masks_by_layer`).
                None for a single node of a single sequence, which sees everything.
            two_parts: for attention in two parts, if the model `takes_two_parts`.

        Returns:
            [B, N, H] hidden states after the final norm.
        """
        text_model = self.text_model
        given = {**self.token_reader()(tokens), self.cache_argument: cache, "use_cache": True}
        given.update(attention_mask=mask, position_ids=self.text_positions(positions))
        if two_parts is None:
            return text_model(**given).last_hidden_state
        with with_tree_attention(text_model.config):
            return text_model(**given, two_parts=two_parts).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """[..., H] → logits [..., V], as the stock model gives them."""
        return self.head_function()(hidden.to(self.head_device))

    @property
    def logit_cap(self) -> float | None:
        """The stock model's logits l are ``cap * tanh(l / cap)``; None if they are those of ``lm_head``."""
        text = self.config.get_text_config()
        return text.final_logit_softcapping if self.caps_logits else None

    def head_function(self) -> Callable[[Tensor], Tensor]:
        """`head` for hidden states on `head_device`."""
        head, cap = self.model.get_output_embeddings(), self.logit_cap
        return head if cap is None else lambda hidden: capped(head(hidden), cap)


def check_vision(config: PretrainedConfig) -> None:
    """Raises `UserError` for a config from which transformers makes a model without a vision tower."""
    if getattr(config, "vision_config", None) is None:
        fix = "take the vision_config of the model's release"
        raise UserError("vision_config is missing or null", f"config of {config.name_or_path}", fix)


def check_media_token(media: Media, target: Target) -> None:
    """Raises `UserError` if the config's id of a kind of media is not that of its token in the tokenizer."""
    given, tokenizer = getattr(target.config, media.token, None), target.tokenizer
    kind = media.token.partition("_")[0]  # GLM's videos have the token of a picture
    mark = getattr(target.processor, f"{kind}_token", None)
    known = [getattr(tokenizer, f"{kind}_token_id", None)]
    known += [tokenizer.convert_tokens_to_ids(mark)] if mark else []
    known = [each for each in known if each is not None and each != tokenizer.unk_token_id]
    rows = target.model.get_input_embeddings().weight.shape[0]
    if type(given) is not int or (given not in known if known else not 0 <= given < rows):
        fix = f"the tokenizer's id is {known[0]}" if known else f"give an id from 0 to {rows - 1}"
        raise UserError(f"{media.token}={shown(given)}", f"config of {target.config.name_or_path}", fix)


def check_attention(name: str) -> None:
    """Raises `UserError` if this attention of transformers does not take the mask of a tree."""
    if name not in MASKED_ATTENTION:
        fix = f"load with {' or '.join(MASKED_ATTENTION)}"
        raise UserError(f"attention '{name}' cannot verify a draft tree", fix=fix)


def within_window(mask: Tensor, past: Sequence[int] | Tensor, depths: Tensor, window: int) -> Tensor:
    """Closes what is ``window`` or more places away in an additive mask [B, 1, n, T] of tree nodes.

    A cached row's place is its column; a node's place is the number of cached rows plus its depth. ``depths`` [B, N]
    are those of all nodes behind the cached rows; the mask's n rows are the last n of them.

    >>> within_window(torch.zeros(1, 1, 2, 4), [2], torch.tensor([[0, 1]]), 2).eq(0).int().tolist()
    [[[[0, 1, 1, 1], [0, 0, 1, 1]]]]
    """
    nodes = depths.shape[1]
    if not isinstance(past, Tensor):
        if max(past) + nodes <= window:
            return mask
        past = torch.tensor(past, device=mask.device)
    rows = past.unsqueeze(1)  # [B, 1]
    columns = torch.arange(mask.shape[-1], device=mask.device).unsqueeze(0)  # [1, T]
    depths = depths.to(mask.device)
    node = (columns - rows).clamp(0, nodes - 1)  # [B, T] the node of a column behind the cached rows
    place = torch.where(columns < rows, columns, rows + depths.gather(1, node))  # [B, T]
    far = (rows + depths[:, -mask.shape[2] :]).unsqueeze(2) - place.unsqueeze(1) >= window  # [B, n, T]
    return mask.masked_fill(far.unsqueeze(1), torch.finfo(mask.dtype).min)


def check_position_ids(given: Tensor | None, own: Tensor, attention_mask: Tensor | None) -> None:
    """Raises `UserError` for position ids of the caller's own, which the engine does not continue.

    Args:
        given: [B, S] or [rows, B, S], those of the model inputs; with M-RoPE the last rows are compared.
        own: [B, S] or [3, B, S], those of the engine.
        attention_mask: [B, S]; padding is not compared.
    """
    if given is None or given.shape[-1] != own.shape[-1]:
        return
    if own.ndim == 3 and given.ndim == 2:
        own = own[0]
    differs = given[-own.shape[0] :].to(own.device) != own if own.ndim == 3 else given.to(own.device) != own
    if attention_mask is not None:
        differs = differs & attention_mask.bool().to(own.device)
    if bool(differs.any()):
        raise UserError(
            "position_ids of your own",
            fix="leave them out; with pictures or videos give the processor's mm_token_type_ids",
        )


def check_token_types(target: Target, input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """Raises `UserError` if the caller's token types say otherwise than ``input_ids`` [B, S] which tokens are text. The
    engine goes by the ids."""
    rest = {name: value for name, value in inputs.items() if name not in TOKEN_TYPES}
    for name, own in target.complete_inputs(input_ids, rest).items():
        given = inputs.get(name)  # [B, S]
        if given is not None and (given.shape != own.shape or bool(((given != 0) != (own != 0)).any())):
            raise UserError(f"{name} of your own", fix="leave them out, or give those of the processor")


def encode_media(model: PreTrainedModel, inputs: Mapping[str, Any], name: str, **given: Any) -> Any:
    """transformers' output of encoding all pictures (or videos) of a request; None without any.

    Features that `generate` has computed already (``mm_encoder_outputs``) are used as they are.
    """
    encoded = (inputs.get("mm_encoder_outputs") or {}).get(name)
    if encoded is not None or all(value is None for value in given.values()):
        return encoded
    encode = getattr(model.model, f"get_{name}_features")
    pixels, *rest = given.values()  # without its name, which differs between releases
    named = {key: value for key, value in zip(list(given)[1:], rest, strict=True) if value is not None}
    return encode(pixels, **named, return_dict=True)


def joined_features(features: Tensor | Sequence[Tensor]) -> Tensor:
    """Features of all pictures (or videos), [I, H] in prompt order. Given as one tensor or as one for each picture,
    with a dimension for pictures or without."""
    joined = features if isinstance(features, Tensor) else torch.cat(list(features), dim=0)
    return joined.flatten(0, -2)


def place_features(embeds: Tensor, mask: Tensor, features: Tensor | None) -> Tensor:
    """Replaces the vectors of ``embeds`` [B, S, H] where ``mask`` [B, S] is true by ``features`` [I, H], in order.

    Raises:
        UserError: their numbers differ.
    """
    expected = int(mask.sum())
    got = 0 if features is None else features.shape[0]
    if expected != got:
        raise UserError(
            f"the prompt has places for {expected} image tokens, the images give {got}",
            fix="give exactly the images that the prompt mentions",
        )
    if features is None:
        return embeds
    return embeds.masked_scatter(mask.unsqueeze(-1), features.to(embeds.device, embeds.dtype))

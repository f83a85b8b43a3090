"""The settings of transformers' `generate`, with their types: one check for a checkpoint's file and for a caller's
arguments. transformers refuses some wrong values in the middle of an answer and ignores others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .errors import UserError, reason_of
from .files import read_object
from .hub import Source
from .strict import read_strict, reject_similar, shown, strict_dataclass

LONGEST_NGRAM = 2**16
"""transformers makes as many lists in each step."""
AnyId = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
"""An id that a tensor can hold. transformers takes ids that no token has, such as -1 for no end token."""
TokenId = Annotated[int, Field(ge=0, le=2**63 - 1)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
NgramSize = Annotated[int, Field(ge=0, le=LONGEST_NGRAM)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


@strict_dataclass
class Watermark:
    """transformers' `WatermarkingConfig`."""

    greenlist_ratio: Share = 0.25
    bias: float = 2.0
    hashing_key: AnyId = 15485863
    seeding_scheme: Literal["lefthash", "selfhash"] = "lefthash"
    context_width: AtLeastOne = 1


@strict_dataclass
class GenerationFields:
    """Types and bounds of the settings that change an answer, and of some others that transformers reads."""

    max_length: Count | None = None
    max_new_tokens: AtLeastOne | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    max_time: float | None = None
    stop_strings: Text | Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    do_sample: bool | None = None
    temperature: NotNegative | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_h: PositiveShare | None = None
    typical_p: PositiveShare | None = None
    epsilon_cutoff: Share | None = None
    eta_cutoff: Share | None = None
    repetition_penalty: Positive | None = None
    encoder_repetition_penalty: Positive | None = None
    no_repeat_ngram_size: NgramSize | None = None
    encoder_no_repeat_ngram_size: NgramSize | None = None
    bad_words_ids: Annotated[tuple[TokenIds, ...], Field(min_length=1)] | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: TokenId | TokenIds | None = None
    exponential_decay_length_penalty: tuple[AnyId, float] | None = None
    suppress_tokens: tuple[AnyId, ...] | None = None
    begin_suppress_tokens: tuple[AnyId, ...] | None = None
    sequence_bias: (
        Annotated[tuple[tuple[TokenIds, float], ...], Field(min_length=1)]
        | Annotated[dict[TokenIds, float], Field(min_length=1)]
        | None
    ) = None
    num_return_sequences: AtLeastOne | None = None
    return_dict_in_generate: bool | None = None
    eos_token_id: AnyId | Annotated[tuple[AnyId, ...], Field(min_length=1)] | None = None
    pad_token_id: AnyId | None = None
    bos_token_id: AnyId | None = None
    decoder_start_token_id: AnyId | Annotated[tuple[AnyId, ...], Field(min_length=1)] | None = None
    prefill_chunk_size: AtLeastOne | None = None


INDICES = ("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id")
"""Settings whose ids are looked up in the logits; ids of the others may lie outside of the vocabulary."""


def checked_settings(
    given: Mapping[str, Any], where: str | Path | None = None, vocabulary: int | None = None
) -> dict[str, Any]:
    """The settings of ``given`` that are not None, in the types that transformers wants: whole numbers as floats where
    it takes floats only, tensors and arrays as lists. Other keys are left out.

    Args:
        where: the file of the settings.
        vocabulary: tokens of the model, if ``given`` has all settings of a request.

    Raises:
        UserError: a value has a wrong type, is out of bounds, or does not fit the vocabulary.
    """
    names = [name for name in GenerationFields.__dataclass_fields__ if given.get(name) is not None]
    values = {name: as_tuples(given[name]) for name in names}
    try:
        fields = GenerationFields(**values)
    except UserError as error:
        raise UserError(error.what, where, error.fix) from None
    checked = {name: as_lists(getattr(fields, name)) for name in names}
    if (mark := given.get("watermarking_config")) is not None:
        checked["watermarking_config"] = _watermark(mark, where)
    if vocabulary is not None:
        _check_ids(checked, where, vocabulary)
    return checked


def _watermark(given: Any, where: str | Path | None) -> Any:
    """A watermark's settings, a dict of a file or an object of transformers, as such an object."""
    from transformers import WatermarkingConfig

    if not isinstance(given, dict) and not hasattr(given, "construct_processor"):
        raise UserError(f"watermarking_config={shown(given)}", where, "give an object")
    if isinstance(given, dict | WatermarkingConfig):
        values = given if isinstance(given, dict) else vars(given)
        read_strict(Watermark, values, "watermarking_config" if where is None else f"watermarking_config of {where}")
    return WatermarkingConfig(**given) if isinstance(given, dict) else given


def _check_ids(settings: Mapping[str, Any], where: str | Path | None, vocabulary: int) -> None:
    """Raises `UserError` for an id that transformers cannot look up in ``vocabulary`` logits."""
    decays = "exponential_decay_length_penalty" in settings
    if decays and "eos_token_id" not in settings:
        raise UserError("exponential_decay_length_penalty without eos_token_id", where, "give the end token's id")
    for name in (*INDICES, "eos_token_id") if decays else INDICES:
        for each in _ids(settings.get(name)):
            if not 0 <= each < vocabulary:
                what = f"{name}={shown(settings[name])}: {each} is not an id of the model's {vocabulary} tokens"
                raise UserError(what, where)


def _ids(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value:
            yield from _ids(each)


def as_tuples(value: Any) -> Any:
    """Tensors, arrays and lists as tuples of Python numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return tuple(as_tuples(each) for each in value)
    if isinstance(value, dict):
        return {as_tuples(key): as_tuples(each) for key, each in value.items()}
    return value


def as_lists(value: Any) -> Any:
    """Tuples as lists. Keys of a dict stay tuples."""
    return [as_lists(each) for each in value] if isinstance(value, tuple) else value


def check_generation_config(source: Source, vocabulary: int) -> None:
    """Checks a checkpoint's generation_config.json. transformers leaves a file that it cannot read out without a word,
    so that answers do not end where they should.

    Raises:
        UserError: the file is damaged, has values that cannot be used, or a misspelt key.
    """
    from transformers import GenerationConfig

    if (path := source.find("generation_config.json")) is None:
        return
    fields = read_object(path, "generation config")
    # the names of many models' own tokens, such as boi_token_id, differ by one letter
    known = [name for name in GenerationConfig().to_dict() if not name.endswith("_token_id")]
    reject_similar(fields, known, path)
    checked_settings(fields, path, vocabulary)
    for part in ({name: value} for name, value in fields.items()):
        ((name, value),) = part.items()
        try:
            GenerationConfig.from_dict(part)
        except Exception as error:  # also TypeError, for values of another type than a check of transformers expects
            raise UserError(f"{name}={shown(value)}", path, reason_of(error)) from None
    try:
        GenerationConfig.from_dict(fields)
    except ValueError as error:  # values that exclude each other
        raise UserError("generation config is not valid", path, reason_of(error)) from None


def check_special_tokens(source: Source, vocabulary: int) -> None:
    """Checks the pad and end tokens of a checkpoint's generation_config.json and config.json. With a wrong id padding
    cannot be decoded, or answers do not end. An end token of config.json is not used if the other file names one.

    Raises:
        UserError: one of them is not an id of the model's ``vocabulary`` tokens.
    """
    keys = ["pad_token_id", "eos_token_id"]
    for name in ("generation_config.json", "config.json"):
        if (path := source.find(name)) is None:
            continue
        fields = read_object(path, name)
        text = fields.get("text_config")
        for section in (fields, text if isinstance(text, dict) else {}):
            for key in keys:
                value = section.get(key)
                ids = value if isinstance(value, list) and key == "eos_token_id" and value else [value]
                if value is not None and not all(type(each) is int and 0 <= each < vocabulary for each in ids):
                    fix = f"give an id from 0 to {vocabulary - 1}, or null"
                    raise UserError(f"{key}={shown(value)}", path, fix)
        if fields.get("eos_token_id") is not None:
            keys = ["pad_token_id"]

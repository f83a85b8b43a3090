"""Options of a call of `LlavaProcessor`, with the names and meanings of transformers' processors."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from .errors import UserError
from .image import MAX_SQUARE_SIDE
from .strict import read_strict, reject_unknown, strict_dataclass

WHERE = "options of the processor"
GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs")
"""Options may be in these, too. Any other place overrides the first one, which is for texts and pictures."""
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "verbose": (True, False),
    "disable_grouping": (True, False),
    "do_convert_rgb": (True,),
    "data_format": ("channels_first",),
    "device": ("cpu",),
    "stride": (0,),
    "do_pad": (False,),
    "is_split_into_words": (False,),
    "return_overflowing_tokens": (False,),
    "return_text_replacement_offsets": (False,),
    "sanitize_control_tokens": (False,),
    "return_metadata": (False,),
    "videos_kwargs": ({},),
    "audio_kwargs": ({},),
}
"""Values of options that change nothing here."""
NO_VIDEOS = "LLaVA reads no videos and no sound"
REFUSED = {
    "text_pair": "a prompt is one text",
    "text_target": "encode it in a call of its own",
    "text_pair_target": "a prompt is one text",
    "is_split_into_words": "give whole texts",
    "stride": "text that truncation cuts off is not returned",
    "return_overflowing_tokens": "text that truncation cuts off is not returned",
    "return_text_replacement_offsets": "processor.encode_with_spans gives the characters of each id",
    "sanitize_control_tokens": "special tokens in a text are always read as such",
    "do_convert_rgb": "the model reads RGB",
    "data_format": "the model reads channels first",
    "device": "move the result with .to(device)",
    "do_pad": "processor.aspect says whether pictures are padded",
    "pad_size": "processor.aspect says whether pictures are padded",
    "image_seq_length": "the checkpoint says how many tokens a picture has",
    "return_metadata": NO_VIDEOS,
    "videos_kwargs": NO_VIDEOS,
    "audio_kwargs": NO_VIDEOS,
}
"""Other options of transformers' processors, and why they are not served."""

Side = Annotated[int, Field(ge=1, le=MAX_SQUARE_SIDE)]
Size = Side | tuple[Side, Side] | dict[str, Side] | None
Deviation = Annotated[float, Field(gt=0)]
Channels = Literal["channels_first", "channels_last"]


@strict_dataclass
class TextOptions:
    """Options for texts, and for the form of the result.

    Attributes:
        padding: None pads where prompts have different lengths. True and "longest" pad to the longest row.
        truncation: None truncates if there is a ``max_length`` and ``padding`` does not need it.
        return_tensors: "pt", "np", or None for lists.
        padding_side: None for the tokenizer's.
    """

    padding: bool | Literal["longest", "max_length", "do_not_pad"] | None = None
    truncation: bool | Literal["longest_first", "only_first", "do_not_truncate"] | None = None
    max_length: int | None = Field(None, ge=1)
    pad_to_multiple_of: int | None = Field(None, ge=1)
    padding_side: Literal["left", "right"] | None = None
    return_tensors: Literal["pt", "np"] | None = "pt"
    add_special_tokens: bool = True
    return_attention_mask: bool = True
    return_token_type_ids: bool = False
    return_mm_token_type_ids: bool = False
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    return_length: bool = False

    @property
    def truncates(self) -> bool:
        if self.truncation is None:
            return self.max_length is not None and self.padding in (None, False)
        return self.truncation not in (False, "do_not_truncate")


@strict_dataclass
class PictureOptions:
    """Options for pictures: settings of the image processor for one call.

    Attributes:
        input_data_format: where arrays have their channels; None to see it from their shape.
    """

    do_resize: bool | None = None
    size: Size = None
    default_to_square: bool | None = None
    resample: int | None = Field(None, ge=0, le=5)
    do_center_crop: bool | None = None
    crop_size: Size = None
    do_rescale: bool | None = None
    rescale_factor: float | None = Field(None, gt=0)
    do_normalize: bool | None = None
    image_mean: float | tuple[float, float, float] | None = None
    image_std: Deviation | tuple[Deviation, Deviation, Deviation] | None = None
    input_data_format: Channels | None = None

    def of_processor(self) -> dict[str, Any]:
        """What the image processor is called with."""
        given = {name: value for name, value in vars(self).items() if name in PICTURE_NAMES and value is not None}
        given.pop("input_data_format", None)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


TEXT_NAMES = tuple(TextOptions.__dataclass_fields__)
PICTURE_NAMES = tuple(PictureOptions.__dataclass_fields__)
CALL_OPTIONS = ("images", *GROUPS, *NO_EFFECT, *REFUSED, *TEXT_NAMES, *PICTURE_NAMES)
"""What `LlavaProcessor.apply_chat_template` gives to `__call__`."""


def read_options(given: Mapping[str, Any]) -> tuple[TextOptions, PictureOptions]:
    """Options as a caller of a processor gives them: one by one, or in `GROUPS`.

    Raises:
        UserError: an option is unknown, is not served here, has a wrong value, or has two.
    """
    options: dict[str, Any] = {}
    common, *others = [_group(given, name) for name in GROUPS]
    for place in (*others, {name: value for name, value in given.items() if name not in GROUPS}):
        for name, value in place.items():
            plain = _plain(value)
            if options.setdefault(name, plain) != plain:
                raise UserError(f"{name} has two values", WHERE, "give it once")
    options = {**{name: _plain(value) for name, value in common.items()}, **options}
    kept = {name: value for name, value in options.items() if value is not None or name == "return_tensors"}
    for name in [name for name, value in kept.items() if value in NO_EFFECT.get(name, ())]:
        del kept[name]
    for name, value in kept.items():
        if name in REFUSED:
            raise UserError(f"{name}={str(value)[:40]} is not supported", WHERE, REFUSED[name])
    reject_unknown(kept, (*TEXT_NAMES, *PICTURE_NAMES), WHERE)
    texts, pictures = ({name: kept[name] for name in names if name in kept} for names in (TEXT_NAMES, PICTURE_NAMES))
    return read_strict(TextOptions, texts, WHERE), read_strict(PictureOptions, pictures, WHERE)


def _group(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = given.get(name)
    if group is not None and not isinstance(group, Mapping):
        raise UserError(f"{name} is not a dictionary", WHERE)
    return group or {}


def _plain(value: Any) -> Any:
    """A value of an option as JSON has it: not of an enumeration, numpy or torch."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)

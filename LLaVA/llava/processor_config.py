"""Types and ranges of the settings in a checkpoint's preprocessor_config.json, processor_config.json and
tokenizer_config.json, for all families. With wrong ones transformers changes pixels without a word, or fails at the
first prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from .errors import UserError
from .files import read_object
from .generation import as_tuples
from .hub import Source
from .strict import shown, strict_dataclass

T = TypeVar("T")
PICTURES, TOKENIZER = "image processor config", "tokenizer config"
LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=LARGEST)]
AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]
Sides = Literal[
    "height", "width", "shortest_edge", "longest_edge", "max_height", "max_width", "min_pixels", "max_pixels"
]
Size = AtLeastOne | Annotated[tuple[AtLeastOne, ...], Field(min_length=1)] | dict[Sides, AtLeastOne | None]
Resampling = Annotated[int, Field(ge=0, le=5)]
Factor = Annotated[float, Field(gt=0, le=1)]
Token = str | dict[str, Any]


@strict_dataclass
class PictureFields:
    """Settings of an image or video processor, of any family."""

    do_resize: bool | None = None
    size: Size | None = None
    default_to_square: bool | None = None
    resample: Resampling | None = None
    do_center_crop: bool | None = None
    crop_size: Size | None = None
    do_rescale: bool | None = None
    rescale_factor: Factor | None = None
    do_normalize: bool | None = None
    image_mean: float | Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    image_std: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    do_convert_rgb: bool | None = None
    do_pad: bool | None = None
    pad_size: Size | None = None
    patch_size: Size | None = None
    temporal_patch_size: AtLeastOne | None = None
    merge_size: AtLeastOne | None = None
    spatial_merge_size: AtLeastOne | None = None
    min_pixels: AtLeastOne | None = None
    max_pixels: AtLeastOne | None = None
    crop_to_patches: bool | None = None
    min_patches: AtLeastOne | None = None
    max_patches: AtLeastOne | None = None
    use_thumbnail: bool | None = None
    image_grid_pinpoints: Annotated[tuple[tuple[AtLeastOne, AtLeastOne], ...], Field(min_length=1)] | None = None
    do_pan_and_scan: bool | None = None
    pan_and_scan_min_crop_size: AtLeastOne | None = None
    pan_and_scan_max_num_crops: AtLeastOne | None = None
    pan_and_scan_min_ratio_to_activate: Positive | None = None
    max_soft_tokens: AtLeastOne | None = None
    pooling_kernel_size: AtLeastOne | None = None
    image_seq_length: AtLeastOne | None = None
    do_sample_frames: bool | None = None
    fps: Positive | None = None
    num_frames: AtLeastOne | None = None
    min_frames: AtLeastOne | None = None
    max_frames: AtLeastOne | None = None


RANGES = (
    ("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels"), ("min_patches", "max_patches"),
    ("min_frames", "max_frames"),
)  # fmt: skip
"""The first may not be above the second."""


@strict_dataclass
class TokenizerFields:
    """Settings of a tokenizer. ``model_max_length`` is 10**30 where there is no limit."""

    model_max_length: Annotated[int, Field(ge=1)] | Positive | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bos_token: Token | None = None
    eos_token: Token | None = None
    unk_token: Token | None = None
    pad_token: Token | None = None
    tokenizer_class: str | None = None
    chat_template: str | dict[str, str] | tuple[dict[str, str], ...] | None = None


PARTS = {
    "preprocessor_config.json": (None,),
    "video_preprocessor_config.json": (None,),
    "processor_config.json": ("image_processor", "video_processor"),
}
"""Files with the settings of pictures, and their sections; None is the whole file."""


def check_processor_files(source: Source) -> None:
    """Checks the files of a checkpoint that describe its processor.

    Raises:
        UserError: a file is damaged, or a setting has a wrong type or is out of range.
    """
    for file, parts in PARTS.items():
        if (path := source.find(file)) is not None:
            fields = read_object(path, "processor config")
            for part in parts:
                check_picture_fields(fields if part is None else fields.get(part) or {}, path)
    if (path := source.find("tokenizer_config.json")) is not None:
        _checked(TokenizerFields, read_object(path, TOKENIZER), path, TOKENIZER)


def check_picture_fields(fields: Any, path: Path) -> None:
    """Raises `UserError` for a setting of an image or video processor that has a wrong type or is out of range."""
    if not isinstance(fields, Mapping):
        raise UserError(f"{PICTURES}: {shown(fields)}", path, "give an object")
    _checked(PictureFields, fields, path, PICTURES)
    size = fields.get("size")
    for values in (fields, size if isinstance(size, Mapping) else {}):
        for low, high in RANGES:
            if values.get(low) is not None and values.get(high) is not None and values[low] > values[high]:
                raise UserError(f"{PICTURES}: {low}={values[low]} is above {high}={values[high]}", path)


def _checked(kind: type[T], fields: Mapping[str, Any], path: Path, what: str) -> T:
    """The fields that ``kind`` knows; each family has others beside them."""
    known = vars(kind)["__dataclass_fields__"]
    try:
        return kind(**{name: as_tuples(value) for name, value in fields.items() if name in known})
    except UserError as error:
        raise UserError(f"{what}: {error.what}", path, error.fix) from None

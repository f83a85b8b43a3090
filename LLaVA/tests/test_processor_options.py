"""Every option of transformers' processors is served as by the stock `LlavaProcessor`, or refused in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from tiny_llava import make_image, make_llava_hf
from transformers.processing_utils import ImagesKwargs, TextKwargs

from llava import LlavaProcessor, UserError, load_processor
from llava.options import CALL_OPTIONS, NO_EFFECT, PICTURE_NAMES, REFUSED, TEXT_NAMES

SQUARE = make_image(width=60, height=60, seed=3)
TEXTS = {"text": ["USER: a b c d e f g", "é"], "padding": True}
"""A call with texts only."""
ONE = {"text": "USER: a b c d e f g"}
PICTURE = {"text": ["<image> a", "b <image> é<image>"], "images": [SQUARE] * 3, "padding": True}
FLOATS = torch.from_numpy(np.asarray(SQUARE).copy()).permute(2, 0, 1) / 255

VALUES: dict[str, list[Any]] = {
    "add_special_tokens": [False], "padding": ["longest", True], "truncation": [True, False, "longest_first"],
    "max_length": [5, 100, np.int64(5)], "pad_to_multiple_of": [16], "padding_side": ["left", "right"],
    "return_attention_mask": [True, False], "return_token_type_ids": [True, False],
    "return_mm_token_type_ids": [True], "return_special_tokens_mask": [True], "return_offsets_mapping": [True],
    "return_length": [True], "return_tensors": ["pt", "np", None, transformers.TensorType.PYTORCH],
    "do_resize": [True, False], "size": [28, {"shortest_edge": 70}, {"height": 56, "width": 56}],
    "default_to_square": [True, False], "resample": [Image.Resampling.NEAREST, 2], "do_center_crop": [True],
    "crop_size": [56, {"height": 56, "width": 56}], "do_rescale": [True, False], "rescale_factor": [0.5],
    "do_normalize": [True, False], "image_mean": [0.5, [0.1, 0.2, 0.3]], "image_std": [0.5, [0.1, 0.2, 0.3]],
    "input_data_format": ["channels_last"], "device": ["cpu", torch.device("cpu")],
}  # fmt: skip
"""Values to compare, by option; those without an effect are added."""
CASES = [(name, value) for name, values in VALUES.items() for value in values]
CASES += [(name, value) for name, values in NO_EFFECT.items() if name != "device" for value in values]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    return load_processor(make_llava_hf(tmp_path_factory.mktemp("options") / "model"))


@pytest.fixture(scope="module")
def stock(ours: LlavaProcessor) -> Any:
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("options of transformers 5.24")
    return transformers.LlavaProcessor(
        ours.image_processor, ours.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def assert_same(found: Any, wanted: Any) -> None:
    assert sorted(found) == sorted(wanted)
    for name in found:
        assert type(found[name]) is type(wanted[name]), name
        for own, other in zip(found[name], wanted[name], strict=True):
            assert np.array_equal(np.asarray(own), np.asarray(other)), name


def test_no_option_is_forgotten() -> None:
    assert set(TextKwargs.__annotations__) | set(ImagesKwargs.__annotations__) <= set(CALL_OPTIONS)
    assert {*TEXT_NAMES, *PICTURE_NAMES} <= set(VALUES), "each served option is compared below"
    assert not {*TEXT_NAMES, *PICTURE_NAMES} & {*NO_EFFECT, *REFUSED}


@pytest.mark.filterwarnings("ignore:.*max_length.* (has no effect|is ignored)")
@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_an_option_is_served_as_by_transformers(ours: LlavaProcessor, stock: Any, name: str, value: Any) -> None:
    calls = [PICTURE] if name in PICTURE_NAMES else [TEXTS, ONE, PICTURE]
    for call in calls:
        if name in ("max_length", "truncation") and call is PICTURE:
            continue
        if name == "pad_to_multiple_of":  # which pads by default here
            call = {**call, "padding": True}
        call = {"return_tensors": None if name == "return_tensors" else "pt", **call, name: value}
        assert_same(ours(**call), stock(**call))
    if name in PICTURE_NAMES:
        once: dict[str, Any] = {"return_tensors": "pt", **PICTURE}
        assert_same(ours(**once, images_kwargs={name: value}), stock(**once, images_kwargs={name: value}))
    elif name in TEXT_NAMES and name not in ("return_tensors", "pad_to_multiple_of"):
        plain = {**ONE, "return_tensors": "pt"}
        assert_same(ours(**plain, text_kwargs={name: value}), stock(**plain, text_kwargs={name: value}))


@pytest.mark.parametrize(
    "call",
    [
        {**ONE, "max_length": 5, "return_tensors": "pt"},
        {**ONE, "max_length": 5, "truncation": False, "return_tensors": "pt"},
        {**ONE, "padding": "max_length", "max_length": 6, "return_tensors": "pt"},
        {**TEXTS, "truncation": True, "max_length": 8, "pad_to_multiple_of": 4, "return_tensors": "pt"},
        {**ONE, "common_kwargs": {"return_tensors": "pt"}, "return_tensors": "np"},
        {**PICTURE, "images_kwargs": {"do_normalize": False}, "return_tensors": "pt"},
        {**PICTURE, "padding": "max_length", "max_length": 80, "return_offsets_mapping": True, "return_tensors": "pt"},
        {**TEXTS, "return_special_tokens_mask": True, "return_length": True, "return_tensors": None},
    ],
    ids=range(8),
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_options_together(ours: LlavaProcessor, stock: Any, call: dict[str, Any], side: str) -> None:
    ours.tokenizer.truncation_side = side
    try:
        assert_same(ours(**call), stock(**call))
    finally:
        ours.tokenizer.truncation_side = "right"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"padding": "bogus"}, "padding='bogus': .*true or false, or 'longest', 'max_length' or 'do_not_pad'"),
        ({"truncation": 1}, "truncation=1: .*true or false, or 'longest_first'"),
        ({"return_tensors": "bogus"}, "return_tensors='bogus': .*'pt' or 'np'"),
        ({"padding": object()}, "padding='<object"),
        ({**TEXTS, "images": None, "truncation": True, "max_length": 6, "pad_to_multiple_of": 4}, "not a multiple"),
        ({"text_kwargs": 5}, "text_kwargs is not a dictionary"),
        ({"text_kwargs": {"padding": True}, "padding": False}, "padding has two values"),
        ({"images_kwargs": {"do_resise": False}}, "did you mean 'do_resize'"),
        ({"size": 10**8}, "size=100000000: .*at most 16384"),
        ({"size": {"height": 0, "width": 3}}, "size.height=0: .*at least 1"),
        ({"size": {"high": 5}}, "image processor cannot use these options .*size"),
        ({"image_mean": [0.5, 0.5]}, "lacks 'image_mean.2'"),
        ({"crop_size": 28}, "pixels of 28 x 28, but the model reads 56 x 56: crop_size"),
        ({"videos_kwargs": {"fps": 1}}, "no videos"),
        ({"text": []}, "empty list of texts"),
        ({"images": [FLOATS] * 3, "do_rescale": False}, "floats"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_one_line(ours: LlavaProcessor, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        ours(**{**PICTURE, **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_says_why(ours: LlavaProcessor, name: str) -> None:
    value: Any = {"do_convert_rgb": False}.get(name, 7)
    with pytest.raises(UserError, match=f"{name}={value} is not supported") as raised:
        ours(**PICTURE, **{name: value})
    assert REFUSED[name] in str(raised.value)


def test_a_length_without_an_effect_is_told(ours: LlavaProcessor) -> None:
    with pytest.warns(UserWarning, match="max_length has no effect"):
        ours(**TEXTS, max_length=3)


def test_options_reach_the_call_through_a_chat_template(ours: LlavaProcessor) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": SQUARE}, {"type": "text", "text": "What?"}]}]
    inputs = ours.apply_chat_template(
        chat, tokenize=True, return_dict=True, do_normalize=False, return_length=True, return_offsets_mapping=True
    )
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "length", "offset_mapping"}
    assert 0.0 <= float(inputs["pixel_values"].min()) <= float(inputs["pixel_values"].max()) <= 1.0


def test_the_border_of_a_padded_picture_has_the_mean_of_the_call(ours: LlavaProcessor) -> None:
    wide = Image.new("RGB", (40, 20), "white")
    ours.aspect, before = "pad", ours.aspect
    try:
        pixels = ours(images=wide, image_mean=0.2, image_std=1.0)["pixel_values"]  # [1, 3, h, w]
    finally:
        ours.aspect = before
    assert torch.allclose(pixels[0, :, 0], torch.tensor(0.0), atol=1 / 255)
    assert torch.allclose(pixels[0, :, 28], torch.tensor(0.8), atol=1 / 255)

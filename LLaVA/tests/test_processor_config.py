"""Settings of a checkpoint's image processor and tokenizer that cannot work are one line when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import UserError
from llava.hub import Source
from llava.processor_config import check_processor_files

NAN, INFINITE = float("nan"), float("inf")
PICTURES: dict[str, tuple[Any, ...]] = {
    "rescale_factor": (-1 / 255, NAN, 0, INFINITE, 255, True, "1/255", []),
    "size": (
        0, -1, 2.5, True, "big", [], [336, 0], {"shortest_edge": NAN}, {"longest_edge": NAN}, {"shortest_edge": True},
        {"longest_edge": -1}, {"shortest_edge": 0}, {"height": 2**40, "width": 4}, {"shortest": 336},
        {"shortest_edge": 4096, "longest_edge": 3136},
    ),
    "min_pixels": (0, -1, NAN, True, "x", [3136]),
    "max_pixels": (0, -1, NAN, True, 1e6),
    "image_std": (0, INFINITE, -0.5, NAN, [0.5, 0, 0.5], [0.5, -0.5, 0.5], [0.5, INFINITE, 0.5], [], "x", True),
    "image_mean": (NAN, INFINITE, [0.5, NAN, 0.5], [], "x", ["0.5"]),
    "do_resize": ([], "no", 1, {}),
    "do_rescale": ("no", 0, []),
    "do_normalize": ("false", 2),
    "do_center_crop": (1, "yes"),
    "do_convert_rgb": ("yes", []),
    "resample": (99, -1, "bicubic", 3.0, True),
    "patch_size": (0, -14, 14.0, "14", {"height": 0}, True),
    "merge_size": (0, -2, 2.0, True),
    "temporal_patch_size": (0, -2, "2"),
    "crop_size": (0, {"height": -336, "width": 336}, "x"),
    "min_patches": (0, "x"),
    "image_grid_pinpoints": ([], [[336]], [[336, 0]], 5, [[336, 672, 3]]),
    "fps": (0, -1, NAN, "x"),
    "max_frames": (0, True),
    "do_pan_and_scan": ("x",),
}  # fmt: skip
TOKENIZER: dict[str, tuple[Any, ...]] = {
    "model_max_length": ("x", 0, -1, NAN, [], True),
    "padding_side": ("middle", 1, True),
    "truncation_side": ("both", []),
    "add_bos_token": ("yes", 1),
    "add_eos_token": ("no", []),
    "add_prefix_space": ("x",),
    "legacy": ("x", 3),
    "clean_up_tokenization_spaces": (0,),
    "bos_token": (1, ["<s>"], True),
    "eos_token": (2, []),
    "tokenizer_class": (5, {}),
    "chat_template": (5, True, [1]),
}
FILES = [(None, "preprocessor_config.json"), (None, "video_preprocessor_config.json")]
FILES += [(part, "processor_config.json") for part in ("image_processor", "video_processor")]
GOOD: tuple[dict[str, Any], ...] = (
    {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "resample": 3, "rescale_factor": 1 / 255},
    {"size": {"shortest_edge": 336, "longest_edge": None}, "crop_size": 336, "image_mean": [0.5] * 3, "image_std": 0.5},
    {"size": [448, 448], "patch_size": {"height": 16, "width": 16}, "do_resize": None, "image_std": [1] * 3},
    {"min_pixels": 3136, "max_pixels": 12845056, "own_setting": "x", "image_grid_pinpoints": [[336, 672], [672, 336]]},
    {"image_mean": [0, 0, 0], "rescale_factor": 1, "fps": 2, "do_center_crop": False},
)


def written(folder: Path, file: str, part: str | None, fields: Any) -> Source:
    (folder / file).write_text(json.dumps(fields if part is None else {part: fields}))
    return Source(folder)


@pytest.mark.parametrize(("part", "file"), FILES)
def test_settings_of_pictures(part: str | None, file: str, tmp_path: Path) -> None:
    for name, values in PICTURES.items():
        for value in values:
            with pytest.raises(UserError) as raised:
                check_processor_files(written(tmp_path, file, part, {name: value}))
            line = str(raised.value)
            assert file in line and "\n" not in line, (name, value)
            assert name in line or "shortest_edge" in line, line
    for fields in GOOD:
        check_processor_files(written(tmp_path, file, part, fields))


def test_settings_of_the_tokenizer(tmp_path: Path) -> None:
    for name, values in TOKENIZER.items():
        for value in values:
            with pytest.raises(UserError, match=rf"{name}.*tokenizer_config\.json"):
                check_processor_files(written(tmp_path, "tokenizer_config.json", None, {name: value}))
    for length in (10**30, 1000000000000000019884624838656, 1e30, 4096, None):
        fields = {"model_max_length": length, "bos_token": {"content": "<s>"}, "pad_token": None, "own": 1}
        check_processor_files(written(tmp_path, "tokenizer_config.json", None, fields))


@pytest.mark.parametrize("value", [5, [1], "x"])
def test_a_section_of_another_type(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give an object"):
        check_processor_files(written(tmp_path, "processor_config.json", "image_processor", value))

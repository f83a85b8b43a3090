"""DeepSpeed's config: what would be a traceback or a broken draft is one line; "auto" is not set."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from eagle.train.engine import DEEPSPEED_KEYS, read_deepspeed_config
from eagle.train.schedule import BatchSizes
from llava import UserError

GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5,
    "bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_comm": True},
}  # fmt: skip


def read(folder: Path, config: Any) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return read_deepspeed_config(path)


def test_a_good_config_stays_as_it_is(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD) == GOOD


def test_auto_is_not_set(tmp_path: Path) -> None:
    config = {
        "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }  # fmt: skip
    assert read(tmp_path, config) == {
        "bf16": {}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bf16": True}, '"bf16": {"enabled": true}'),
        ({"zero_optimization": 2}, '"zero_optimization": {"stage": 2}'),
        ({"zero_optimization": {"stage": 3}}, "use stage 0, 1 or 2"),
        ({"zero_optimization": {"stage": "2"}}, "use stage 0, 1 or 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offloading is not supported"),
        ({"fp16": {"enabled": True}}, "fp16 cannot be trained on a CPU"),
        ({"bf16": {"enabled": 1}}, "give true or false"),
        ({"gradient_clipping": "0.5"}, "give a number"),
        ({"gradient_clippin": 0.5}, "did you mean 'gradient_clipping'"),
        ({"optimizer": {"type": "AdamW"}}, "'train' section"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, GOOD | change)
    assert said in str(raised.value) and "ds.json" in str(raised.value) and "\n" not in str(raised.value)


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**20, 0.5, -0.5, math.nan, math.inf, "", "auto", "x", [], [1], {}, {"enabled": 1},
    {"stage": None}, {"stage": [2]}, {"stage": 3.0}, {"a": {"b": []}},
]  # fmt: skip


@pytest.mark.parametrize("key", DEEPSPEED_KEYS)
def test_any_json_at_any_key_is_a_config_or_a_line(tmp_path: Path, key: str) -> None:
    for value in VALUES:
        try:
            config = read(tmp_path, GOOD | {key: value})
            BatchSizes.from_deepspeed(config, 2, "ds.json")
        except UserError as error:
            assert "\n" not in str(error)


def test_any_json_as_the_whole_file(tmp_path: Path) -> None:
    for value in itertools.chain(VALUES):
        try:
            BatchSizes.from_deepspeed(read(tmp_path, value), 1, "ds.json")
        except UserError as error:
            assert "\n" not in str(error)

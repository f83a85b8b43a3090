"""DeepSpeed's config: what would be a traceback or a broken draft is one line; "auto" is not set."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from json_paths import key_paths, replaced

from eagle.train.engine import DEEPSPEED_KEYS, PRECISION_KEYS, PlainEngine, read_deepspeed_config
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
        ({"bf16": {"enable": True}}, "did you mean 'enabled'"),
        ({"fp16": {"enabled": False, "loss_scal": 0}}, "did you mean 'loss_scale'"),
        ({"gradient_clipping": "0.5"}, "give a number"),
        ({"bfloat16": {"enabled": True}}, 'write "bf16": {"enabled": true}'),
        ({"gradient_clippin": 0.5}, "did you mean 'gradient_clipping'"),
        ({"optimizer": {"type": "AdamW"}}, "'train' section"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, GOOD | change)
    assert said in str(raised.value) and "ds.json" in str(raised.value) and "\n" not in str(raised.value)


def test_without_deepspeed_the_settings_without_effect_are_named(
    arguments: Callable[..., list[str]], run: Callable[[list[str]], int], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for more, said in (({"wandb": {"enabled": True}, "torch_autocast": {"enabled": True}}, True), ({}, False)):
        (tmp_path / "own.json").write_text(json.dumps({**GOOD, "bf16": {"enabled": False}, **more}))
        argv = arguments(f"ck{said}", "--tracker", "none", "--max-steps", "1", deepspeed=tmp_path / "own.json")
        assert run(argv) == 0
        assert ("these settings have no effect: wandb, torch_autocast\n" in capsys.readouterr().out) == said


def test_another_precision_or_clipping_is_not_resumed(
    arguments: Callable[..., list[str]], run: Callable[[list[str]], int], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = tmp_path / "own.json"

    def call(change: dict[str, Any], *extra: str) -> int:
        config.write_text(json.dumps({**GOOD, "bf16": {"enabled": False}, **change}))
        return run(arguments("ck", "--tracker", "none", *extra, deepspeed=config))

    assert call({}, "--max-steps", "1") == 0
    assert call({"gradient_clipping": 1.0}, "--resume") == 2
    assert "the interrupted run had gradient_clipping=0.5, this one has 1.0" in capsys.readouterr().err
    assert call({"bf16": {"enabled": True}}, "--resume") == 2
    assert "the interrupted run had bf16=False, this one has True" in capsys.readouterr().err
    assert call({}, "--resume", "--max-steps", "2") == 0


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


@pytest.mark.slow
def test_any_json_anywhere_is_accepted_by_deepspeed_or_a_line(tmp_path: Path) -> None:
    """Also in keys that only DeepSpeed knows: no traceback, and nothing that it would refuse later."""
    engine = pytest.importorskip("eagle.train.engine_deepspeed")
    rich = replaced(GOOD, ["zero_optimization"], {"stage": 2, "reduce_bucket_size": 1000, "allgather_partitions": True})
    rich |= {"fp16": {"enabled": False, "loss_scale": 0}, "flops_profiler": {"enabled": False}, "steps_per_print": 5}
    rich |= {"tensorboard": {"enabled": False}, "activation_checkpointing": {"cpu_checkpointing": False}}
    accepted = refused = 0
    for place in [*key_paths(rich), ("zero_optimization", "stag"), ("flops_profiler", "enable"), ("wandb", "x")]:
        for value in VALUES:
            try:
                engine.check_accepted(read(tmp_path, replaced(rich, place, value)))
                accepted += 1
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert accepted > 50 and refused > 200


def test_sections_have_the_keys_of_deepspeed() -> None:
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    for name, known in PRECISION_KEYS.items():
        fields = getattr(precision, f"DeepSpeed{name.upper()}Config").model_fields
        assert set(known) == set(fields)


def test_a_run_without_deepspeed_refuses_fp16() -> None:
    config = {"fp16": {"enabled": True}}
    with pytest.raises(UserError, match="fp16 needs DeepSpeed"):
        PlainEngine(None, None, config, BatchSizes(1, 1, 1))  # type: ignore[arg-type]


def test_any_json_as_the_whole_file(tmp_path: Path) -> None:
    for value in itertools.chain(VALUES):
        try:
            BatchSizes.from_deepspeed(read(tmp_path, value), 1, "ds.json")
        except UserError as error:
            assert "\n" not in str(error)

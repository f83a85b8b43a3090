"""One table of types checks the settings of a file and of a caller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

from llava.errors import UserError
from llava.generation import check_generation_config, checked_settings
from llava.hub import Source


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"min_new_tokens": -1}, "min_new_tokens=-1: FILE (give at least 0)"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: FILE (give a whole number)"),
        ({"max_new_tokens": True}, "max_new_tokens=True: FILE (give a whole number)"),
        ({"bad_words_ids": [3]}, "bad_words_ids.0=3: FILE (give a list)"),
        ({"bad_words_ids": [[1, "x"]]}, "bad_words_ids.0.1='x': FILE (give a whole number)"),
        ({"suppress_tokens": 5}, "suppress_tokens=5: FILE (give a list)"),
        ({"begin_suppress_tokens": [None]}, "begin_suppress_tokens.0=None: FILE (give a whole number)"),
        ({"exponential_decay_length_penalty": [3]}, "lacks 'exponential_decay_length_penalty.1': FILE"),
        ({"sequence_bias": [[[1], "x"]]}, "sequence_bias.0.1='x': FILE (give a number)"),
        ({"sequence_bias": []}, "sequence_bias=[]: FILE"),
        ({"forced_eos_token_id": "x"}, "forced_eos_token_id='x': FILE (give a whole number"),
        ({"encoder_repetition_penalty": 0}, "encoder_repetition_penalty=0: FILE (give more than 0"),
        ({"max_time": "x"}, "max_time='x': FILE (give a number)"),
        ({"eos_token_id": 10**30}, "eos_token_id="),
        ({"temperature": "x"}, "temperature='x': FILE (give a number)"),
        ({"renormalize_logits": "x"}, "renormalize_logits='x': FILE (give true or false)"),
        ({"no_repeat_ngram_size": 10**10}, "no_repeat_ngram_size=10000000000: FILE (give at most 65536)"),
        ({"stop_strings": 5}, "stop_strings=5: FILE (give a text"),
        ({"watermarking_config": {"bias": "x"}}, "bias='x': watermarking_config of FILE (give a number)"),
        (
            {"watermarking_config": {"bios": 1}},
            "unknown key 'bios': watermarking_config of FILE (did you mean 'bias'?)",
        ),
        ({"watermarking_config": 5}, "watermarking_config=5: FILE (give an object)"),
    ],
    ids=str,
)
def test_a_wrong_value_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as raised:
        checked_settings(given, "FILE")
    assert str(raised.value).startswith(line)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"bad_words_ids": [[5, 10]]}, "10 is not an id of the model's 10 tokens"),
        ({"sequence_bias": {(10,): 1.0}}, "10 is not an id"),
        ({"sequence_bias": [[[12], 1.0]]}, "12 is not an id"),
        ({"forced_eos_token_id": 10}, "10 is not an id"),
        ({"exponential_decay_length_penalty": [3, 1.5], "eos_token_id": -1}, "-1 is not an id"),
        ({"exponential_decay_length_penalty": [3, 1.5]}, "without eos_token_id"),
    ],
    ids=str,
)
def test_an_id_outside_of_the_vocabulary(given: dict[str, Any], line: str) -> None:
    assert checked_settings(given)
    with pytest.raises(UserError, match=line):
        checked_settings(given, "FILE", vocabulary=10)


def test_values_get_the_types_that_transformers_wants() -> None:
    given = {
        "repetition_penalty": 2, "eos_token_id": torch.tensor([1, 2]), "max_new_tokens": np.int64(3), "top_k": None,
        "temperature": np.float32(0.5), "bad_words_ids": ((1,),), "do_sample": np.bool_(True), "pixel_values": 1,
        "sequence_bias": {(1, 2): 1}, "exponential_decay_length_penalty": (3, 2), "suppress_tokens": [], "top_p": 1,
    }  # fmt: skip
    checked = checked_settings(given, vocabulary=10)
    assert checked == {
        "repetition_penalty": 2.0, "eos_token_id": [1, 2], "max_new_tokens": 3, "temperature": 0.5,
        "bad_words_ids": [[1]], "do_sample": True, "sequence_bias": {(1, 2): 1.0},
        "exponential_decay_length_penalty": [3, 2.0], "suppress_tokens": [], "top_p": 1.0,
    }  # fmt: skip
    assert type(checked["repetition_penalty"]) is float and type(checked["max_new_tokens"]) is int


def test_ids_that_no_token_has_are_served_where_transformers_takes_them() -> None:
    given = {"eos_token_id": [2, 99], "pad_token_id": -1, "suppress_tokens": [-1, 99]}
    assert checked_settings(given, vocabulary=10) == given
    assert checked_settings({"eos_token_id": -1}, vocabulary=10) == {"eos_token_id": -1}


def test_watermarks() -> None:
    made = checked_settings({"watermarking_config": {"bias": 3}})["watermarking_config"]
    assert isinstance(made, WatermarkingConfig) and made.bias == 3
    for own in (WatermarkingConfig(bias=1.0), SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1])):
        assert checked_settings({"watermarking_config": own})["watermarking_config"] is own
    with pytest.raises(UserError, match="greenlist_ratio"):
        checked_settings({"watermarking_config": WatermarkingConfig(greenlist_ratio=7.0)})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"early_stopping": 5}, "early_stopping=5: "), ({"early_stopping": []}, "early_stopping=[]: "),
        ({"temprature": 0.5}, "did you mean 'temperature'?"), ({"Top_P": 0.5}, "did you mean 'top_p'?"),
        ({"cache_implementation": "no"}, "cache_implementation='no': "), ({"num_return_sequences": 3}, "3"),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_transformers_would_leave_out_is_named(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2, **fields}))
    with pytest.raises(UserError) as raised:
        check_generation_config(Source(str(tmp_path)), 10)
    assert said in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_keys_of_other_programs_are_accepted(tmp_path: Path) -> None:
    """Those of published files that transformers does not know, too."""
    fields = {"chat_format": "chatml", "max_window_size": 6144, "boi_token_id": 1, "_from_model_config": True,
              "transformers_version": "4.41.0", "attn_implementation": "sdpa", "eos_token_id": 2}  # fmt: skip
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(fields))
    check_generation_config(Source(str(tmp_path)), 10)
    path.write_text(json.dumps({**fields, "temperatur": 0.5}))
    with pytest.raises(UserError, match="temperatur"):
        check_generation_config(Source(str(tmp_path)), 10)

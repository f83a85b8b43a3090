from __future__ import annotations

import pytest

from llava import UserError
from lmms_eval_msd.settings import DEFAULT_MAX_NEW_TOKENS, GenerationSettings

read = GenerationSettings.from_task


@pytest.mark.parametrize(
    ("given", "engine"),
    [
        (None, {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "do_sample": False}),
        ({"max_new_tokens": 16, "temperature": 0.0, "do_sample": False}, {"max_new_tokens": 16, "do_sample": False}),
        ({"max_gen_toks": 8}, {"max_new_tokens": 8, "do_sample": False}),
        (  # --gen_kwargs temperature=0.7 over a task's do_sample: false
            {"temperature": 0.7, "do_sample": False, "top_p": 0.9, "top_k": 0},
            {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
        ),
        (
            {"temperature": 0.7, "top_p": 0},  # the best token alone, as in transformers
            {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7, "top_p": 0},
        ),
        (  # greedy search has no top_p
            {"temperature": 0, "top_p": 1.0, "top_k": 5, "do_sample": True},
            {"max_new_tokens": 1024, "do_sample": False},
        ),
        ({"do_sample": True}, {"max_new_tokens": 1024, "do_sample": True, "temperature": None}),
        (
            {"repetition_penalty": 1.1, "num_beams": 1, "image_sizes": [(1, 1)], "what": 3},
            {"max_new_tokens": 1024, "do_sample": False, "repetition_penalty": 1.1, "num_beams": 1},
        ),
    ],
)
def test_engine_settings(given, engine):
    assert read(given).engine == engine


def test_until_ends_the_answer():
    settings = read({"until": ["ASSISTANT:", "\n\n", ""]})
    assert settings.until == ("ASSISTANT:", "\n\n")
    assert settings.cut("one\n\ntwo ASSISTANT: three") == "one"
    assert settings.cut("one") == "one"
    assert read({"until": "###"}).until == ("###",)
    assert read({"until": None}).until == ()


@pytest.mark.parametrize("given", [{"until": 3}, {"until": [3]}, {"temperature": "warm"}])
def test_bad_settings(given):
    with pytest.raises(UserError):
        read(given)


def test_task_settings_stay_as_they_are():
    given = {"until": ["x"], "max_new_tokens": 3}
    read(given)
    assert given == {"until": ["x"], "max_new_tokens": 3}

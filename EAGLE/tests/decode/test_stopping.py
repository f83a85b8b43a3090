"""Where an answer ends: the same place as if the criteria were asked after each token."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_llava import make_liuhaotian
from transformers import StopStringCriteria

from eagle.decode.stopping import Stopper, first_stop
from eagle.families import load_target


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_target(make_liuhaotian(tmp_path_factory.mktemp("stopping") / "base"), dtype="float32").tokenizer


def test_stop_strings_are_found_at_the_token_that_completes_them(tokenizer) -> None:
    """Texts that begin in the prompt, in an earlier cycle or in this one, that end inside a token, or that the first
    tokens are too few for."""
    generator, found = random.Random(0), 0
    for _ in range(200):
        ids = [generator.randrange(5, len(tokenizer) - 5) for _ in range(14)]
        prompt, before = generator.randrange(1, 4), generator.randrange(3)
        text = tokenizer.decode(ids[(start := generator.randrange(10)) : start + generator.randrange(1, 5)])
        criterion = StopStringCriteria(tokenizer, [text[: generator.randrange(1, 12)] or "x", "two", "o t"])
        context = torch.tensor([ids[:prompt]])
        answer = ids[prompt:]
        counts = range(before + 1, len(answer) + 1)
        stops = [count for count in counts if criterion(torch.tensor([ids[: prompt + count]]), None)[0]]
        expected = stops[0] - before if stops else None
        assert first_stop(criterion, context, answer[:before], answer[before:]) == expected
        found += expected is not None
    assert found > 50


def test_ends_before_and_after_a_stop_string(tokenizer) -> None:
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    criterion = StopStringCriteria(tokenizer, ["two"])
    place = first_stop(criterion, torch.tensor([[5]]), [], ids)
    assert place is not None and 1 < place < len(ids)
    stopper = Stopper([criterion], 1)
    assert stopper.cut(torch.tensor([[5]]), [], ids) == (ids[:place], True)
    stopper.max_new_tokens = place - 1
    assert stopper.cut(torch.tensor([[5]]), [], ids) == (ids[: place - 1], True)
    stopper.max_new_tokens = len(ids)
    assert stopper.cut(torch.tensor([[5]]), ids[:1], ids[1:]) == (ids[1:place], True)


def test_other_criteria_are_asked_after_each_token() -> None:
    asked = []

    def at_seven(ids: torch.Tensor, scores: None) -> torch.Tensor:
        asked.append(ids[0].tolist())
        return ids[:, -1] == 7

    stopper = Stopper([at_seven], 2)
    assert stopper.cut(torch.tensor([[1, 2]]), [3], [4, 5]) == ([4, 5], False)
    assert stopper.cut(torch.tensor([[1, 2]]), [3], [4, 7, 5]) == ([4, 7], True)
    assert asked == [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 3, 4, 7]]

"""batch_size > 1: the answers of one by one, in the order of the requests, and statistics that add up."""

from __future__ import annotations

import pytest
from eval_support import IMAGES, SOME_SLOW, TREE, class_of, load, request
from tiny_draft import make_draft

from eagle.families import load_target
from lmms_eval_msd import model as models


def some_requests():
    short = {"max_new_tokens": 9, "until": []}
    return [
        request("How many?", IMAGES[:1], 0),
        request("Name two rivers and say which one is longer.", None, 1, short),
        request("Which two?", IMAGES[:2], 2),
        request("How many?", IMAGES[1:2], 3, task="other"),
        request("And here?", IMAGES[2:], 4),
        request("Rivers?", None, 5, short),
        request("How many?", IMAGES[:1], 6, __padding_only__=True),
    ]


@pytest.mark.parametrize("name", ["llava_msd", "qwen2_vl_msd"])
def test_batches_without_a_draft_change_nothing(name, tmp_path, family_bases):
    check_batches(name, False, tmp_path, family_bases)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_batches_change_nothing(name, tmp_path, family_bases):
    check_batches(name, True, tmp_path, family_bases)


def check_batches(name, speculative, tmp_path, family_bases):
    folder, model_class = family_bases[name], class_of(name)
    draft = make_draft(tmp_path / "draft", load_target(folder)) if speculative else None
    single, several = (load(model_class, folder, draft, batch_size=size, **TREE) for size in (1, "3"))
    alone, together = single.generate_until(some_requests()), several.generate_until(some_requests())
    assert [each.text for each in together] == [each.text for each in alone]
    assert [each.token_counts for each in together] == [each.token_counts for each in alone]
    assert len({each.text for each in alone}) >= 5
    assert several.stats.keys() == {"tiny", "other"}
    for task, stats in single.stats.items():
        assert (several.stats[task].requests, several.stats[task].new_tokens) == (stats.requests, stats.new_tokens)
    counts = [each.token_counts.output_tokens for each in together]
    assert single.stats["tiny"].requests == 5  # the seventh only fills up
    assert single.stats["tiny"].new_tokens == sum(counts[:3] + counts[4:6])
    if not speculative:
        assert [stats.tau for stats in several.stats.values()] == [1.0, 1.0]


def test_an_end_token_is_counted_once(base):
    """The padding of short answers in a batch is not part of them."""
    model = load(models.LlavaMSD, base, batch_size=2)
    inputs = model.prompts.inputs([model.prompts.write("How many?", IMAGES[:1])])
    last = int(model.msd.generate(**inputs, max_new_tokens=6, temperature=0).sequences[0, -1])
    model.msd.target.model.generation_config.eos_token_id = last
    model.msd.target.model.generation_config.pad_token_id = last  # as where pad and end are one token
    requests = [request("How many?", IMAGES[:1], 0), request("Rivers?", None, 1)]
    counts = [each.token_counts.output_tokens for each in model.generate_until(requests)]
    assert sum(counts) == model.stats["tiny"].new_tokens
    assert counts[0] <= 6
    assert counts[0] != counts[1]

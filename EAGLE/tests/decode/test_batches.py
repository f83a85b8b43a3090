"""Batches: every row is what it would be alone, though rows differ in length, pictures, acceptance and end."""

from types import SimpleNamespace

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from transformers import TextStreamer

from eagle import MSDModel, TreeConfig
from eagle.families import load_target
from llava import UserError

PROMPTS = [
    "USER: Name two rivers. ASSISTANT:",
    "USER: <image>\nHow many shapes are there in this picture, and where? ASSISTANT:",
    "USER: Hi ASSISTANT:",
    "USER: <image>\n<image>\nWhich is larger? ASSISTANT:",
]
TREES = [TreeConfig(5, 10, 60), TreeConfig(3, 2, 6), TreeConfig(0, 3, 4), TreeConfig(4, 4, 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    base = make_liuhaotian(folder / "base")
    draft = make_draft(folder / "draft", load_target(base, dtype=torch.float32))
    return MSDModel.from_pretrained(base, draft, dtype=torch.float32)


def prepare(model, prompts=PROMPTS):
    return model.target.prepare(prompts, [make_image(seed=i) for i in range(sum(p.count("<image>") for p in prompts))])


def alone(model, **settings):
    """New tokens of every prompt by itself, from transformers."""
    seen, answers = 0, []
    for prompt in PROMPTS:
        count = prompt.count("<image>")
        inputs = model.target.prepare(prompt, [make_image(seed=seen + i) for i in range(count)])
        seen += count
        output = model.target.model.generate(**inputs, do_sample=False, **settings)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def answers_of(output, inputs, expected):
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: len(want)] for row, want in zip(new, expected, strict=True)]


def right_padded(inputs):
    """The same prompts with their padding on the other side."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    for row in range(len(ids)):
        padding = int((mask[row] == 0).sum())
        ids[row], mask[row] = ids[row].roll(-padding), mask[row].roll(-padding)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_rows_equal_transformers_alone(model, tree):
    inputs, expected = prepare(model), alone(model, max_new_tokens=40)
    assert inputs["attention_mask"].min() == 0
    output = model.generate(**inputs, temperature=0, max_new_tokens=40, tree=tree)
    assert answers_of(output, inputs, expected) == expected
    assert output.stats.new_tokens == sum(map(len, expected))
    assert output.stats.requests == len(PROMPTS)


def test_padding_may_be_on_the_right(model):
    inputs, expected = prepare(model), alone(model, max_new_tokens=20)
    output = model.generate(**right_padded(inputs), temperature=0, max_new_tokens=20)
    assert answers_of(output, inputs, expected) == expected


def test_rows_accept_different_numbers_of_tokens(model):
    """Else the rows would stay in step and the tests above would show little."""
    stats = model.generate(**prepare(model), temperature=0, max_new_tokens=40, tree=TREES[0]).stats
    assert len(set(stats.accept_lengths)) > 1


def test_rows_end_on_their_own(model):
    free = alone(model, max_new_tokens=40)
    ends = [free[0][4], free[3][9]]
    inputs, expected = prepare(model), alone(model, max_new_tokens=40, eos_token_id=ends)
    assert len({len(answer) for answer in expected}) > 1
    output = model.generate(
        **inputs, temperature=0, max_new_tokens=40, eos_token_id=ends, pad_token_id=7, tree=TREES[0]
    )
    assert answers_of(output, inputs, expected) == expected
    assert output.tokens == expected
    for row, answer in zip(output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), expected, strict=True):
        assert set(row[len(answer) :]) <= {7}


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 12}], ids=str
)
def test_processors_see_each_row_as_if_alone(model, settings):
    end = alone(model, max_new_tokens=8)[1][-1]
    settings = {**settings, "eos_token_id": end, "max_new_tokens": 30}
    inputs, expected = prepare(model), alone(model, **settings)
    output = model.generate(**inputs, temperature=0, tree=TREES[1], **settings)
    assert answers_of(output, inputs, expected) == expected


def test_several_sampled_answers_to_one_prompt(model):
    inputs = model.target.prepare(PROMPTS[1], [make_image(seed=0)])
    output = model.generate(**inputs, temperature=1.0, seed=3, num_return_sequences=3, max_new_tokens=12, tree=TREES[1])
    assert output.sequences.shape[0] == 3
    assert len({tuple(row) for row in output.sequences.tolist()}) > 1


def test_a_batch_works_as_custom_generate(model):
    inputs, expected = prepare(model), alone(model, max_new_tokens=15)
    found = model.target.model.generate(**inputs, custom_generate=model, do_sample=False, max_new_tokens=15)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == expected


def test_a_batch_cannot_be_streamed(model):
    with pytest.raises(UserError, match="streamer for 4 prompts"):
        model.generate(**prepare(model), max_new_tokens=4, streamer=TextStreamer(model.tokenizer))


@pytest.mark.parametrize(
    ("tree", "device", "nodes"),
    [
        ((5, 10, 60), "cpu", {1: 60, 4: 15, 100: 1}),
        ((6, 3, 12), "cpu", {2: 12, 5: 12, 8: 7, 30: 2, 60: 1}),
        ((5, 10, 60), "cuda", {1: 60, 2: 60, 4: 32, 8: 16, 200: 1}),
        ((10, 10, 200), "cuda", {1: 200, 8: 25}),
    ],
)
def test_a_batch_shares_the_nodes_of_a_device(tree, device, nodes):
    tree = TreeConfig(*tree)
    assert {batch: tree.for_batch(batch, device).total_tokens for batch in nodes} == nodes
    assert tree.for_batch(1, device) == tree


@pytest.mark.parametrize(
    ("processors", "gib", "nodes"),
    [
        (132, 79.1, 32),  # H100
        (108, 39.4, 32),  # A100 of 40 GB
        (128, 23.6, 16),  # RTX 4090: many processors, little memory
        (84, 47.5, 16),  # RTX A6000
        (60, 46.5, 16),  # a part of an H100
    ],
)
def test_a_large_gpu_verifies_more_nodes_of_a_batch(processors, gib, nodes, monkeypatch):
    asked = []

    def properties(device):
        asked.append(torch.device(device))
        return SimpleNamespace(multi_processor_count=processors, total_memory=int(gib * 2**30))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert TreeConfig(5, 10, 60).for_batch(8, "cuda:1").total_tokens == nodes
    assert asked == [torch.device("cuda:1")]  # of the device that verifies
    assert TreeConfig(5, 10, 60).for_batch(8, "cpu").total_tokens == 7


def test_smaller_trees_are_narrower_too():
    assert TreeConfig(5, 10, 60).for_batch(4, "cpu") == TreeConfig(5, 3, 15)
    assert TreeConfig(6, 3, 12).for_batch(2, "cpu") == TreeConfig(6, 3, 12)
    assert TreeConfig(6, 3, 12).for_batch(8, "cpu").top_k == 2

"""Training data of LLaVA-1.6: the loss mask, pictures of any size, and both ways to read hidden states."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_support import turns
from tiny_llava import make_image
from tiny_stock import make_llava_next

from eagle.conversations import read_conversation
from eagle.families import Target, load_target, template_of
from eagle.families.template import join_images
from eagle.ge_data import allocation
from eagle.hidden_states.shards import ShardDataset
from eagle.train.online import Processes, load_corpus
from eagle.train.settings import TrainConfig

SIZES = {"square.png": (60, 60), "wide.png": (112, 40), "high.png": (30, 90)}
RECORDS: list[dict[str, Any]] = [
    {"id": "text", "conversations": turns("Name two rivers.", "The Nile and the Rhine.", "And?", "That is all.")},
    *(
        {
            "id": name,
            "image": name,
            "conversations": turns("<image>\nWhat colours?", f"Those of {name}.", "More?", "No."),
        }
        for name in SIZES
    ),
    {
        "id": "two",
        "image": ["wide.png", "square.png"],
        "conversations": turns("<image> or <image>?", "The second.", "Why?", "It is red."),
    },
    {
        "id": "adjacent",
        "image": ["wide.png", "square.png"],
        "conversations": turns("Look:<image><image>", "I see.", "And?", "Nothing."),
    },
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_next(tmp_path_factory.mktemp("next") / "base")


@pytest.fixture(scope="module")
def next_target(base: Path) -> Target:
    return load_target(base, dtype="float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, (name, (width, height)) in enumerate(SIZES.items()):
        make_image(folder / name, width, height, seed)
    return folder


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_the_loss_mask_covers_the_assistants_words(next_target: Target, photos: Path, record: dict[str, Any]) -> None:
    template, conversation = template_of(next_target), read_conversation(record, 0)
    prepared = template.prepare(conversation, photos, 1000)
    edges = [0, *(prepared.loss_mask.int().diff().nonzero().flatten() + 1).tolist(), len(prepared.loss_mask)]
    runs = [prepared.input_ids[a:b] for a, b in pairwise(edges) if prepared.loss_mask[a]]
    said = [next_target.tokenizer.decode(run).strip() for run in runs]
    assert said == [f"{answer}</s>" for _, answer in conversation.turns]
    prompt = "".join(segment.text for segment in template.segments(conversation))
    inputs = next_target.prepare(prompt, [photos / name for name in conversation.images])
    assert torch.equal(inputs["input_ids"][0], prepared.input_ids)
    assert inputs.keys() - {"attention_mask", "input_ids"} >= prepared.images.keys()
    for name, value in prepared.images.items():
        assert torch.equal(inputs[name], value)


def test_a_prompt_for_an_answer_is_the_chat_prompt(next_target: Target, photos: Path) -> None:
    template = template_of(next_target)
    question = template.segments(read_conversation(RECORDS[1], 0))[0].text
    assert question == next_target.chat_prompt("What colours?", num_images=1)


def test_pictures_of_different_tiling_are_read_as_alone(next_target: Target, photos: Path) -> None:
    template = template_of(next_target)
    items = [template.prepare(read_conversation(record, 0), photos, 1000).images for record in RECORDS[1:4]]
    assert len({item["pixel_values"].shape[1] for item in items}) > 1
    joined = join_images(items)
    model = next_target.model.model
    with torch.inference_mode():
        together = model.get_image_features(**joined, return_dict=True).pooler_output
        for index, item in enumerate(items):
            (alone,) = model.get_image_features(**item, return_dict=True).pooler_output
            torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=1e-5)


def test_outline_joined_with_the_answers_is_the_conversation(next_target: Target, photos: Path) -> None:
    template = template_of(next_target)
    conversation = read_conversation(RECORDS[-2], 0)
    prepared, outline = (make(conversation, photos, 1000) for make in (template.prepare, template.outline))
    asked = ~prepared.loss_mask
    ids = [index for turn in outline.turns for index in turn.asked]
    assert ids == prepared.input_ids[asked].tolist()
    assert [turn.pictures for turn in outline.turns] == [2, 0]
    first = template.first_pictures(outline.images, 1)
    assert first["image_sizes"].tolist() == [[40, 112]]


def test_allocation_and_online_training_read_the_same_states(
    base: Path, next_target: Target, photos: Path, tmp_path: Path
) -> None:
    annotations = tmp_path / "records.json"
    annotations.write_text(json.dumps(RECORDS))
    flags = ["--model", str(base), "--json_data_path", str(annotations), "--image_data_path", str(photos)]
    flags += ["--gpus", "cpu", "--dtype", "float32", "--max-length", "400"]
    for kind in "tv":
        argv = ["--outdir", str(tmp_path / kind), "--model_type", f"llava_next_{kind}", *flags]
        assert allocation.main(argv) == 0
    args = Namespace(
        basepath=str(base), dtype="float32", model_type="llava_next", limit=None, image_folder=photos,
        cpdir=str(tmp_path / "ckpt"), resume=False, batch_tokens=None, self_check=True,
    )  # fmt: skip
    files = {"text": annotations, "image": annotations}
    corpus = load_corpus(args, files, TrainConfig(max_length=400), Processes())
    for kind, count in (("text", 1), ("image", len(RECORDS) - 1)):
        stored = ShardDataset(tmp_path / kind[0].replace("i", "v"))
        samples = {stored[index].id: stored[index] for index in range(len(stored))}
        assert len(samples) == len(corpus.sources[kind][0]) == count
        (read,) = corpus.read([[corpus.sources[kind][0][index] for index in range(count)]])
        for sample in read:
            same = samples[sample.id]
            assert torch.equal(sample.input_ids, same.input_ids) and torch.equal(sample.loss_mask, same.loss_mask)
            torch.testing.assert_close(sample.hidden.float(), same.hidden.float(), atol=2e-3, rtol=2e-2)
            assert (kind == "image") == bool(sample.image_mask.any())
    record = read_conversation(RECORDS[2], 0)
    inputs = next_target.prepare(
        "".join(segment.text for segment in template_of(next_target).segments(record)), [photos / record.images[0]]
    )
    with torch.inference_mode():
        output = next_target.model(**inputs, output_hidden_states=True)
    states = ShardDataset(tmp_path / "v")
    found = next(states[index] for index in range(len(states)) if states[index].id == record.id)
    torch.testing.assert_close(found.hidden.float(), output.hidden_states[-1][0], atol=2e-3, rtol=2e-2)


MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} [/INST]{% else %} {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
)


def test_another_chat_template_than_vicunas_is_learnt(base: Path, photos: Path, tmp_path: Path) -> None:
    """As it is asked at inference."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    (folder / "chat_template.jinja").write_text(MISTRAL)
    other = load_target(folder, dtype="float32")
    segments = template_of(other).segments(read_conversation(RECORDS[1], 0))
    assert segments[0].text == other.chat_prompt("What colours?", 1) == "[INST] <image>\nWhat colours? [/INST]"
    assert segments[1].text.strip() == "Those of square.png.</s>"

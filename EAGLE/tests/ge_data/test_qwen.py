"""Qwen2-VL and Qwen2.5-VL: masks, ids as at inference, and states that depend on the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_support import Write, image_record, text_record, turns
from tiny_llava import make_image
from tiny_stock import make_qwen

from eagle.conversations import Unusable, read_conversation
from eagle.families import Target, load_target, template_of
from eagle.ge_data import allocation
from eagle.ge_data.reader import collate
from eagle.hidden_states.shards import ShardDataset
from llava.errors import run_cli

from ..families.test_conversations import spoken

END = "<|im_end|>"
SPOKEN: list[tuple[dict[str, Any], list[str]]] = [
    (text_record(7), [f"The Nile is longer than the Rhine. {END}", f"That is 7.{END}"]),
    (image_record(3), [f"Red and 3.{END}", f"No, only red.{END}"]),
    ({"conversations": turns("What is it?\n<image>", "A cat"), "image": "wide.png"}, [f"A cat{END}"]),
    ({"conversations": turns("one", "uno", "<image> two", "dos"), "image": "a.png"}, [f"uno{END}", f"dos{END}"]),
    ({"conversations": turns("<image> and <image>?", "Both"), "image": ["a.png", "wide.png"]}, [f"Both{END}"]),
    ({"conversations": turns("Übersetze 日本語", "Größe\n\nund   mehr\n")}, [f"Größe\n\nund   mehr\n{END}"]),
]


@pytest.fixture(scope="module", params=["2", "2.5"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen(tmp_path_factory.mktemp("qwen") / "base", version=request.param)


@pytest.fixture(scope="module")
def qwen(base: Path) -> Target:
    return load_target(base, dtype="float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, (name, width, height) in enumerate((("a.png", 60, 60), ("b.png", 60, 60), ("wide.png", 112, 40))):
        make_image(folder / name, width, height, seed)
    make_image(folder / "thin.png", 900, 2)
    return folder


@pytest.mark.parametrize(("row", "answers"), SPOKEN, ids=range(len(SPOKEN)))
def test_masked_tokens_are_the_answers(qwen: Target, photos: Path, row: dict[str, Any], answers: list[str]) -> None:
    prepared = template_of(qwen).prepare(read_conversation(row, 0), photos, 1000)
    assert spoken(template_of(qwen), prepared) == answers


@pytest.mark.parametrize("row", [row for row, _ in SPOKEN], ids=range(len(SPOKEN)))
def test_ids_are_those_of_inference(qwen: Target, photos: Path, row: dict[str, Any]) -> None:
    template, conversation = template_of(qwen), read_conversation(row, 0)
    prompt = "".join(segment.text for segment in template.segments(conversation))
    prepared = template.prepare(conversation, photos, 1000)
    inputs = qwen.prepare(prompt, [photos / name for name in conversation.images])
    assert torch.equal(inputs["input_ids"][0], prepared.input_ids)
    for name, value in prepared.images.items():
        assert torch.equal(inputs[name], value)


def test_prompt_before_an_answer_is_the_chat_prompt(qwen: Target, photos: Path) -> None:
    prepared = template_of(qwen).prepare(read_conversation(image_record(3), 0), photos, 1000)
    prompt = qwen.chat_prompt("What colours?", 1)
    asked = qwen.prepare(prompt, [photos / "a.png"])["input_ids"][0]
    assert torch.equal(prepared.input_ids[: int(prepared.loss_mask.nonzero()[0])], asked)


def test_a_picture_the_processor_refuses_is_skipped(qwen: Target, photos: Path) -> None:
    row = {"conversations": turns("<image>", "a"), "image": "thin.png"}
    with pytest.raises(Unusable, match="broken_picture"):
        template_of(qwen).prepare(read_conversation(row, 0), photos, 1000)


def test_padded_batch_equals_single(qwen: Target, photos: Path) -> None:
    rows = [image_record(1), text_record(2, 3), image_record(3, "wide.png")]
    items = [template_of(qwen).prepare(read_conversation(row, 0), photos, 400) for row in rows]
    batch = qwen.prefill(collate(items))
    for row, item in enumerate(items):
        alone = qwen.prefill(collate([item])).hidden[0]
        torch.testing.assert_close(batch.hidden[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_stored_states_are_the_stock_models_and_depend_on_the_picture(
    base: Path, qwen: Target, photos: Path, annotations: Write, tmp_path: Path
) -> None:
    samples = []
    for name in ("a.png", "b.png"):
        flags = ["--model", str(base), "--json_data_path", str(annotations([image_record(1, name)])), "--gpus", "cpu"]
        flags += ["--model_type", f"{qwen.family}_v", "--image_data_path", str(photos), "--dtype", "float32"]
        assert run_cli(lambda f=flags, n=name: allocation.main([*f, "--outdir", str(tmp_path / n)])) == 0
        samples.append(ShardDataset(tmp_path / name)[0])
        images = qwen.prepare(qwen.chat_prompt("x", 1), [photos / name])
        given = {key: images[key] for key in ("pixel_values", "image_grid_thw")}
        types = (samples[-1].input_ids == qwen.config.image_token_id).int()[None]
        with torch.no_grad():
            stock = qwen.model.model(input_ids=samples[-1].input_ids[None], mm_token_type_ids=types, **given)
        torch.testing.assert_close(samples[-1].hidden.float(), stock.last_hidden_state[0], rtol=0.01, atol=0.02)
    first, second = samples
    assert torch.equal(first.input_ids, second.input_ids)
    after = int(first.image_mask.nonzero()[-1]) + 1
    change = (first.hidden.float() - second.hidden.float()).abs().amax(-1)
    assert float(change[after:].min()) > 0.005

"""Inputs without transformers' ``mm_token_type_ids``: pictures and videos keep their positions."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image
from tiny_stock import make_qwen

from eagle import MSDModel
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from llava import UserError

PICTURE, VIDEO = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("types")
    target = load_target(make_qwen(folder / "base"), dtype="float32")
    return MSDModel(target, load_draft(make_draft(folder / "draft", target), dtype=torch.float32))


def video_inputs(model: MSDModel) -> dict[str, Any]:
    metadata = {"total_num_frames": 4, "fps": 2.0, "frames_indices": list(range(4))}
    frames = [np.full((56, 84, 3), 60 * i, np.uint8) for i in range(4)]
    return dict(
        model.processor(
            text=[f"USER: {VIDEO} What happens? ASSISTANT:"], videos=[frames], video_metadata=[metadata],
            do_sample_frames=False, return_tensors="pt",
        )
    )  # fmt: skip


def inputs_of(model: MSDModel, kind: str) -> dict[str, Any]:
    pictures = [make_image(width=112, height=84), make_image(width=60, height=112)]
    if kind == "video":
        return video_inputs(model)
    texts = {
        "text": ("USER: Name two rivers. ASSISTANT:", 0),
        "picture": (f"USER: {PICTURE} What colours are these? ASSISTANT:", 1),
        "batch": ([f"USER: {PICTURE} Which colours? ASSISTANT:", f"USER: And {PICTURE} ASSISTANT:"], 2),
    }
    text, count = texts[kind]
    return model.target.prepare(text, pictures[:count])


def without_types(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}


@pytest.mark.parametrize("kind", ["text", "picture", "batch", "video"])
def test_answers_are_those_with_token_types(model: MSDModel, kind: str) -> None:
    inputs = inputs_of(model, kind)
    given = model.target.complete_inputs(inputs["input_ids"], without_types(inputs))
    if kind == "text":
        assert given == {}
    else:
        assert torch.equal(given["mm_token_type_ids"], inputs["mm_token_type_ids"].to(torch.int64))
        assert model.target.complete_inputs(inputs["input_ids"], inputs) == {}
    expected = model.generate(**inputs, **GREEDY).sequences
    assert torch.equal(model.generate(**without_types(inputs), **GREEDY).sequences, expected)
    assert torch.equal(model.generate(**without_types(inputs), **GREEDY, use_msd=False).sequences, expected)


@pytest.mark.parametrize(("kind", "grid"), [("picture", "image_grid_thw"), ("video", "video_grid_thw")])
def test_positions_of_text_are_refused(model: MSDModel, kind: str, grid: str) -> None:
    """What a caller's own `generate` hands on where it has encoded the pictures and numbered them as text."""
    inputs = inputs_of(model, kind)
    ids, grids = inputs["input_ids"], {grid: inputs[grid]}
    right, _ = model.target.prompt_positions(ids, grids)
    again, _ = model.target.prompt_positions(ids, {"position_ids": torch.cat([right[:1], right])})
    assert torch.equal(again, right)
    as_text = torch.arange(ids.shape[1]).expand(4, 1, -1)
    with pytest.raises(UserError, match="tokens of a picture or video as text"):
        model.target.prompt_positions(ids, {"position_ids": as_text})


def test_transformers_interface_without_token_types_is_right_or_refused(model: MSDModel) -> None:
    inputs = inputs_of(model, "picture")
    expected = model.generate(**inputs, **GREEDY).sequences
    try:
        output = model.target.model.generate(**without_types(inputs), **GREEDY, custom_generate=model)
    except UserError as error:
        assert "mm_token_type_ids" in str(error)
    else:
        assert torch.equal(output, expected)


@pytest.mark.parametrize("through", ["engine", "custom_generate"])
def test_a_video_of_one_token_a_frame(model: MSDModel, through: str) -> None:
    """Each of its tokens is later than the one before, as in text, but in one row of the positions only."""
    metadata = {"total_num_frames": 6, "fps": 2.0, "frames_indices": list(range(6))}
    inputs = dict(
        model.processor(
            text=[f"USER: {VIDEO} What happens? ASSISTANT:"], video_metadata=[metadata], do_sample_frames=False,
            videos=[[np.full((28, 28, 3), 40 * i, np.uint8) for i in range(6)]], return_tensors="pt",
            size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9},
        )
    )  # fmt: skip
    assert inputs["video_grid_thw"].tolist() == [[3, 2, 2]]
    expected = model.target.model.generate(**inputs, **GREEDY)
    if through == "engine":
        assert torch.equal(model.generate(**inputs, **GREEDY).sequences, expected)
    else:
        assert torch.equal(model.target.model.generate(**inputs, **GREEDY, custom_generate=model), expected)


@pytest.mark.parametrize("through_generate", [False, True])
def test_a_prompt_that_ends_with_a_picture_is_refused(model: MSDModel, through_generate: bool) -> None:
    """transformers continues from the three position ids of its last token, which are not those of a text."""
    inputs = model.target.prepare("USER: <|vision_start|><|image_pad|>", [make_image(width=112, height=84)])
    with pytest.raises(UserError, match="ends with a picture"):
        if through_generate:
            model.target.model.generate(**inputs, **GREEDY, custom_generate=model)
        else:
            model.generate(**inputs, **GREEDY)

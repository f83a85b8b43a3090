"""Merging a picture's rows in the draft: which rows are left, with which positions, and that answers stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from tiny_stock import make_qwen

from eagle import MSDModel, TreeConfig
from eagle.decode.drafter import Drafter
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.compression import Compression, Merging, image_runs
from eagle.drafts.config import DraftConfig
from eagle.families import load_target
from eagle.families.base import Prefill
from llava import UserError

TREE = TreeConfig(4, 6, 24)
TEXTS = ["USER: [] Which of these can you count? ASSISTANT:", "USER: Hi ASSISTANT:", "USER: [] and [] ASSISTANT:"]
IMAGE = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1, 0]).bool()  # a picture of five rows, one of two


def plan(compression: Compression, is_image: torch.Tensor = IMAGE) -> Merging:
    found = compression.plan(is_image)
    assert found is not None
    return found


def test_pooling_takes_neighbours_and_leaves_short_pictures_alone() -> None:
    features = torch.arange(10.0)[:, None]
    found = plan(Compression(2))
    assert found.rows.tolist() == list(range(10)) and found.first.tolist() == [0, 1, 4, 6, 7, 8, 9]
    assert found.source.tolist() == [0, 3, 5, 6, 7, 8, 9]
    assert found.mean(features).flatten().tolist() == [0, 2, 4.5, 6, 7, 8, 9]
    assert found.pick(IMAGE).tolist() == [False, True, True, False, True, True, False]


def test_no_rows_at_all() -> None:
    found = plan(Compression(0))
    assert found.rows.tolist() == found.source.tolist() == [0, 6, 9] and found.first.tolist() == [0, 1, 2]


def test_nothing_changes_where_pictures_are_short_enough() -> None:
    for tokens in (5, 6, 1000, None):
        assert Compression(tokens).plan(IMAGE) is None
    assert Compression(0).plan(torch.zeros(4).bool()) is None


@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_every_row_goes_somewhere_and_means_are_kept(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    features = torch.randn(120, 4, generator=generator)
    image = torch.rand(120, generator=generator) < 0.5
    image[30:100] = True
    found = plan(Compression(tokens), image)
    assert torch.equal(found.rows, torch.arange(120))  # each row once
    sizes = found.first.diff(append=torch.tensor([120]))
    assert int(found.first[0]) == 0 and int(sizes.min()) > 0 and torch.equal(found.source, found.first + sizes - 1)
    assert torch.equal(found.pick(features)[~found.pick(image)], features[~image])  # text as it was, in order
    runs = image_runs(found.pick(image))
    assert len(runs) == len(image_runs(image)) and max(end - start for start, end in runs) <= tokens
    means = torch.stack([part.mean(dim=0) for part in features.split(sizes.tolist())])
    torch.testing.assert_close(found.mean(features), means)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (-1, "image tokens of the draft: -1"),
        ("few", "'few'"),
        (True, "True"),
        (2.5, "2.5"),
        ("\u00b2", "\u00b2"),
        ("9" * 5000, "999..."),
        ("-1", "'-1'"),
    ],
)
def test_bad_settings_are_named(tokens: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Compression().replaced(tokens)


def test_settings_given_win_over_the_drafts_own() -> None:
    own = Compression(32)
    assert own.replaced() == own
    assert own.replaced(0) == Compression(0)
    assert own.replaced("all") == Compression(None)
    assert own.replaced("8") == Compression(8)


# Decoding


@pytest.fixture(scope="module", params=["llava", "qwen plain", "qwen mrope"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("compression")
    base = make_liuhaotian(folder / "base") if request.param == "llava" else make_qwen(folder / "base")
    target = load_target(base, dtype="float32")
    mrope = {"msd": {"positions": "mrope"}} if "mrope" in request.param else {}
    sections = {"rope_scaling": {"mrope_section": [1, 1, 2]}} if "qwen" in request.param else {}
    draft = make_draft(folder / "draft", target, **mrope, **sections)
    return MSDModel(target, load_draft(draft, dtype=torch.float32))


def written(model: MSDModel, text: str) -> str:
    mark = "<image>\n" if model.target.family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    return text.replace("[]", mark)


def inputs_of(model: MSDModel, texts: str | list[str]) -> dict[str, torch.Tensor]:
    texts = [texts] if isinstance(texts, str) else texts
    count = sum(text.count("[]") for text in texts)
    pictures = [make_image(width=40 + 30 * i, height=64, seed=i) for i in range(count)]
    prompts = [written(model, text) for text in texts]
    return model.target.prepare(prompts if len(prompts) > 1 else prompts[0], pictures)


def with_compression(model: MSDModel, tokens: int | str) -> MSDModel:
    return MSDModel(model.target, model.draft, TREE, draft_image_tokens=tokens)


@pytest.mark.parametrize("tokens", [0, 1, 3, 500, "all"])
def test_answers_are_those_of_transformers(model: MSDModel, tokens: int | str) -> None:
    changed = with_compression(model, tokens)
    for text in (TEXTS[0], TEXTS[2], "[] USER: Which? ASSISTANT:", "USER: [][] Which? ASSISTANT:"):
        inputs = inputs_of(model, text)
        expected = model.target.model.generate(**inputs, max_new_tokens=20, do_sample=False)
        output = changed.generate(**inputs, max_new_tokens=20, temperature=0)
        assert torch.equal(output.sequences, expected)


def test_rows_of_a_batch_with_different_numbers_of_pictures(model: MSDModel) -> None:
    """Each row is what it is alone: tokens, and the acceptance that depends on the draft's rows and positions."""
    changed = with_compression(model, 2)
    batch = inputs_of(model, TEXTS)
    settings = {"max_new_tokens": 20, "temperature": 0, "tree": TREE}
    together = changed.generate(**batch, **settings)
    new, accepted, seen = together.sequences[:, batch["input_ids"].shape[1] :], [], 0
    for row, text in enumerate(TEXTS):
        pictures = [make_image(width=40 + 30 * i, height=64, seed=i) for i in range(seen, seen + text.count("[]"))]
        seen += len(pictures)
        alone = model.target.prepare(written(model, text), pictures)
        output = changed.generate(**alone, **settings)
        assert output.sequences[0, alone["input_ids"].shape[1] :].tolist() == new[row].tolist()
        accepted += output.stats.accept_lengths
    assert sorted(accepted) == sorted(together.stats.accept_lengths)


def test_video(model: MSDModel) -> None:
    if model.target.family == "llava":
        pytest.skip("the family has no video")
    frames = [np.asarray(Image.fromarray(np.full((56, 84, 3), 40 * i, np.uint8))) for i in range(6)]
    text = "USER: <|vision_start|><|video_pad|><|vision_end|> What happens? ASSISTANT:"
    metadata = {"total_num_frames": 6, "fps": 2.0, "frames_indices": list(range(6))}
    inputs = dict(model.processor(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    ))  # fmt: skip
    expected = model.target.model.generate(**inputs, max_new_tokens=20, do_sample=False)
    for tokens in (0, 3):
        output = with_compression(model, tokens).generate(**inputs, max_new_tokens=20, temperature=0)
        assert torch.equal(output.sequences, expected)


@torch.inference_mode()
def started(model: MSDModel, inputs: dict[str, torch.Tensor], tokens: int | None) -> tuple[Drafter, Prefill]:
    length = inputs["input_ids"].shape[1]
    (prefill,) = model.target.prefill_each(inputs, model.target.new_cache(1, length))
    drafter = Drafter(model.draft, model.target.head, length, TREE, compression=Compression(tokens))
    drafter.start(0, prefill, inputs["input_ids"], torch.tensor([7]))
    return drafter, prefill


def test_the_drafts_cache_does_not_grow_with_the_picture(model: MSDModel) -> None:
    inputs = inputs_of(model, TEXTS[2])
    full, prefill = started(model, inputs, None)
    images = int(prefill.image_mask.sum())
    assert full.cache.length == inputs["input_ids"].shape[1]
    for tokens in (0, 1, 3):
        drafter, _ = started(model, inputs, tokens)
        assert drafter.cache.length == full.cache.length - images + 2 * tokens


@torch.inference_mode()
def test_no_rows_is_the_prompt_without_its_pictures(model: MSDModel) -> None:
    """With 0 the draft is in the state that text rows alone give, with the target's states and its own positions."""
    inputs = inputs_of(model, TEXTS[0])
    drafter, prefill = started(model, inputs, 0)
    draft, ids = model.draft, inputs["input_ids"]
    following = torch.cat([ids[0, 1:], torch.tensor([7])])
    text = ~torch.cat([prefill.image_mask[0, 1:], torch.tensor([False])])
    x = draft.fuse(prefill.hidden[:, text], draft.embed_tokens(following[text])[None])
    mrope = draft.config.options.positions == "mrope"
    positions = prefill.positions[..., text] if mrope else torch.arange(int(text.sum()))[None]
    assert torch.allclose(drafter._last[0], draft(x, positions)[0, -1], atol=1e-5)


def test_the_config_of_a_draft_says_what_it_was_trained_with(model: MSDModel, tmp_path: Path) -> None:
    config = DraftConfig.from_dict({**model.draft.config.to_dict(), "msd": {"image_tokens": 4, "image_merge": "pool"}})
    model.draft.config, before = config, model.draft.config
    try:
        save_draft(model.draft, tmp_path)
    finally:
        model.draft.config = before
    again = MSDModel(model.target, load_draft(tmp_path, dtype=torch.float32))
    assert again.compression == Compression(4)
    bad = {**config.to_dict(), "msd": {"image_merge": "kmeans"}}
    with pytest.raises(UserError, match="image_merge='kmeans': here"):
        DraftConfig.from_dict(bad, where="here")

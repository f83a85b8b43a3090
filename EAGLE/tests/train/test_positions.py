"""A draft with M-RoPE positions trains at exactly the positions at which it decodes."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_draft import make_draft
from tiny_llava import make_image
from tiny_stock import make_qwen
from train_support import DRAFT, make_sample

from eagle.conversations import Conversation
from eagle.decode.drafter import Drafter
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import Target, load_target, template_of
from eagle.families.base_weights import BaseTensors
from eagle.families.template import Prepared
from eagle.ge_data.extract import source_of
from eagle.ge_data.reader import Reader
from eagle.hidden_states.shards import Sample, ShardDataset, write_shard
from eagle.train.collate import collate, sample_positions
from eagle.train.loss import DraftObjective
from eagle.train.rollout import places_of
from eagle.train.settings import TrainConfig
from llava.errors import UserError

SIZES = {"a.png": (60, 60), "wide.png": (112, 40), "tall.png": (56, 100)}
TURNS = {
    "text": [("Name two rivers.", "The Nile and the Rhine."), ("And?", "The Elbe.")],
    "image": [("<image>\nWhat colours?", "Red and blue."), ("More?", "No.")],
    "images": [("<image> and <image> differ?", "Yes."), ("<image> too?", "They all do.")],
}
PICTURES = {"text": (), "image": ("a.png",), "images": ("a.png", "tall.png", "wide.png")}


@pytest.fixture(scope="module", params=["2", "2.5"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(make_qwen(tmp_path_factory.mktemp("qwen") / "base", version=request.param), dtype="float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, (width, height) in SIZES.items():
        make_image(folder / name, width, height)
    return folder


def prepared(target: Target, kind: str, photos: Path) -> Prepared:
    return template_of(target).prepare(Conversation(kind, tuple(TURNS[kind]), PICTURES[kind]), photos, 500)


def stored(target: Target, kind: str, photos: Path, folder: Path) -> Sample:
    """A conversation as it comes back from a shard."""
    source = source_of(target, "tiny")
    ((sample,),) = Reader(target, template_of(target), source, 1000).read([[prepared(target, kind, photos)]])
    write_shard(folder, 0, 1, [(0, sample)], [], source)
    return ShardDataset(folder)[0]


def skip_where_times_are_doubled(target: Target, kind: str) -> None:
    """transformers 5.4 doubles a picture's time number in Qwen2.5-VL; 5.24 does not (docs/porting.md)."""
    if target.family == "qwen2_5_vl" and kind != "text" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip(f"transformers {transformers.__version__} may double a picture's time number")


@pytest.mark.parametrize("kind", TURNS)
def test_rows_stand_where_decoding_puts_them(
    target: Target, photos: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a prompt, which ends before the last answer, and those drafted behind it."""
    skip_where_times_are_doubled(target, kind)
    trained = sample_positions(stored(target, kind, photos, tmp_path / "shards"))  # [3, S]
    conversation = prepared(target, kind, photos)
    ids, spoken = conversation.input_ids[None], conversation.loss_mask.nonzero().flatten()
    length = int(spoken[-4])  # tokens of the prompt: some of the last answer are still to come
    changes = {"msd": {"positions": "mrope"}, "rope_scaling": {"mrope_section": [1, 1, 2]}}
    draft = load_draft(make_draft(tmp_path / "draft", target, **changes), dtype=torch.float32)
    with torch.inference_mode():
        inputs = {"input_ids": ids[:, :length], **conversation.images}
        (prefill,) = target.prefill_each(inputs, target.new_cache(1, length))
        drafter = Drafter(draft, target.head, length + 8, TreeConfig(3, 1, 5))
        asked: list[torch.Tensor] = []
        rotary = draft.rotary.forward
        monkeypatch.setattr(draft.rotary, "forward", lambda at, dtype: asked.append(at) or rotary(at, dtype))
        drafter.start(0, prefill, ids[:, :length], ids[0, length : length + 1])
        assert torch.equal(asked.pop()[:, 0], trained[:, :length])
        for step in range(3):
            behind = places_of(trained[:, None], torch.tensor([[length + step]]))
            torch.testing.assert_close(drafter._rope(step, 1), rotary(behind, draft.dtype))
    assert (trained[:, -1] == trained[0, -1]).all() and (kind == "text") == bool(trained[0, -1] == ids.shape[1] - 1)


def test_numbers_may_run_ahead_of_the_tokens(target: Target, tmp_path: Path) -> None:
    """As they do behind a long video of Qwen2.5-VL, whose frames count in seconds."""
    changes = {"msd": {"positions": "mrope"}, "rope_scaling": {"mrope_section": [1, 1, 2]}}
    draft = load_draft(make_draft(tmp_path / "draft", target, **changes), dtype=torch.float32)
    ids, ahead = torch.arange(5, 11)[None], 1000
    with torch.inference_mode():
        (prefill,) = target.prefill_each({"input_ids": ids}, target.new_cache(1, 6))
        later = prefill._replace(positions=prefill.positions + ahead, next_position=prefill.next_position + ahead)
        drafter = Drafter(draft, target.head, 14, TreeConfig(3, 1, 5))
        drafter.start(0, later, ids, torch.tensor([11]))
        for step in range(3):
            expected = draft.rotary(torch.full((3, 1, 1), ahead + 6 + step), draft.dtype)
            torch.testing.assert_close(drafter._rope(step, 1), expected)


@pytest.mark.parametrize("kind", TURNS)
def test_positions_are_those_of_transformers(target: Target, photos: Path, tmp_path: Path, kind: str) -> None:
    skip_where_times_are_doubled(target, kind)
    sample = stored(target, kind, photos, tmp_path / kind)
    assert len(sample.image_grids) == len(PICTURES[kind])
    grids = {"image_grid_thw": sample.image_grids * torch.tensor([1, 2, 2])} if PICTURES[kind] else {}
    positions, _ = target.prompt_positions(sample.input_ids[None], grids)
    assert torch.equal(sample_positions(sample), positions[:, 0])


def test_samples_without_grids_are_refused() -> None:
    batch = collate([make_sample(9)], 40, 64, positions="mrope")
    assert torch.equal(batch.positions[:, 0], torch.arange(9).expand(3, -1))
    with pytest.raises(UserError, match=r"known are 0 of 2 image tokens: sample s1"):
        collate([make_sample(9, image=2, seed=1)], 40, 64, positions="mrope")


@pytest.mark.parametrize("sections", [None, [1, 1, 1]])
def test_sections_must_fill_a_head(sections: list[int] | None) -> None:
    shape = {**DRAFT, "msd": {"positions": "mrope"}, "rope_scaling": {"mrope_section": sections}}
    base = BaseTensors(torch.zeros(40, 16), torch.zeros(40, 16))
    with pytest.raises(UserError, match=r"mrope_section .* for heads of 8"):
        DraftObjective(DraftModel(DraftConfig.from_dict(shape)), base, TrainConfig())

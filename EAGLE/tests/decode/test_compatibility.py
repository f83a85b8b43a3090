"""What is looked at when a base and a draft are loaded as a pair."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_draft import make_draft
from tiny_llava import make_image, make_llava_hf

from eagle import MSDModel, TreeConfig
from eagle.decode.compatibility import check_compatible
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.msd import DraftModel
from eagle.families import Target, load_target
from llava.errors import UserError


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(make_llava_hf(tmp_path_factory.mktemp("pair") / "base"), dtype=torch.float32)


def draft_of(target: Target, folder: Path, rows: int = 0, **changes: object) -> DraftModel:
    """A draft with ``rows`` more rows of vocabulary than the base, or fewer."""
    draft = load_draft(make_draft(folder, target, agree=1.0, **changes), dtype=torch.float32, device="cpu")
    size = draft.config.vocab_size + rows
    weight = torch.cat([draft.embed_tokens.weight.detach(), torch.zeros(max(rows, 0), draft.config.hidden_size)])
    draft.embed_tokens = torch.nn.Embedding.from_pretrained(weight[:size])
    draft.config = replace(draft.config, vocab_size=size)
    return draft


def test_rows_added_behind_the_drafts_come_from_the_base(target: Target, tmp_path: Path) -> None:
    """`llava-hf` releases have 64 rows more than the base that the published drafts were trained for."""
    whole, less = draft_of(target, tmp_path), draft_of(target, tmp_path, -3)
    answers = []
    inputs = target.prepare(target.chat_prompt("How many?", num_images=1), [make_image()])
    for draft in (whole, less):
        msd = MSDModel(target, draft, TreeConfig(1, 60, 100))
        answers.append(msd.generate(**inputs, max_new_tokens=24, temperature=0.0))
    table = target.model.get_input_embeddings().weight
    assert torch.equal(less.embed_tokens.weight, table) and less.config.vocab_size == len(table)
    assert answers[0].stats.accept_lengths == answers[1].stats.accept_lengths
    assert sum(answers[0].stats.accept_lengths) > 0
    wanted = target.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(answers[1].sequences, wanted)


@pytest.mark.parametrize(
    ("how", "shared"),
    [("equal", True), ("fewer rows", True), ("16 bit", False), ("one value differs", False), ("trained", False)],
)
def test_an_equal_embedding_is_stored_once(target: Target, tmp_path: Path, how: str, shared: bool) -> None:
    draft = draft_of(target, tmp_path, -3 if how == "fewer rows" else 0)
    if how == "16 bit":
        draft.to(torch.bfloat16)
    elif how == "one value differs":
        draft.embed_tokens.weight.data[-1, -1] += 1e-3
    elif how == "trained":
        draft.embed_tokens.requires_grad_(True)
    before, table = draft.embed_tokens.weight.clone(), target.model.get_input_embeddings().weight
    check_compatible(target, draft)
    own = draft.embed_tokens.weight
    assert (own.data_ptr() == table.data_ptr()) is shared
    assert torch.equal(own[: len(before)], before) and own.shape == table.shape


@pytest.mark.parametrize("how", ["equal", "16 bit", "fewer rows", "other", "other width"])
def test_an_lm_head_of_the_draft_is_compared_with_the_bases(
    target: Target, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, head = make_draft(tmp_path, target, agree=1.0), target.model.get_output_embeddings().weight.detach().clone()
    given = {"16 bit": head.bfloat16(), "fewer rows": head[:-3].clone(), "other width": head[:, :4].clone()}
    given["other"] = torch.randn(head.shape)
    path = folder / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": given.get(how, head).contiguous()}, path)
    draft = load_draft(folder, dtype=torch.float32)
    caplog.clear()
    msd = MSDModel(target, draft, TreeConfig(1, 60, 100))
    assert ["lm_head is not the base's" in line for line in caplog.messages] == ([True] if "other" in how else [])
    inputs = target.prepare(target.chat_prompt("How many?", num_images=1), [make_image()])
    stats = msd.generate(**inputs, max_new_tokens=24, temperature=0.0).stats
    assert sum(stats.accept_lengths) > 0  # the base's own head is used


@pytest.mark.parametrize("rows", [-3, 3])
def test_another_vocabulary_is_refused(target: Target, tmp_path: Path, rows: int) -> None:
    draft = draft_of(target, tmp_path, rows)
    draft.embed_tokens.weight.data.normal_()  # of another base
    size = target.model.get_input_embeddings().num_embeddings
    with pytest.raises(UserError, match=f"vocabulary {size + rows} in the draft, {size} in the base"):
        check_compatible(target, draft)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_another_family_is_refused(target: Target, tmp_path: Path, model_type: str) -> None:
    with pytest.raises(UserError, match=f"family {model_type} in the draft, llava in the base"):
        MSDModel(target, draft_of(target, tmp_path, model_type=model_type))


def test_another_hidden_size_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hidden size 16 in the draft"):
        check_compatible(target, draft_of(target, tmp_path, hidden_size=16))


def test_an_embedding_of_another_base_is_told(
    target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    draft = draft_of(target, tmp_path)
    with caplog.at_level(logging.WARNING, "eagle.decode.compatibility"):
        check_compatible(target, draft.to(torch.bfloat16))  # rounding is no difference
        assert not caplog.records
        draft.embed_tokens.weight.data = draft.embed_tokens.weight.data.flip(0)
        check_compatible(target, draft)
    assert "token embedding is not the base's" in caplog.text

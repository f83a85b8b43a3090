"""Drafts in vLLM are ours: equal counters of accepted tokens by position, and equal answers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from serving_support import Pair, Run

from eagle.drafts.draft_vocab import write_draft_vocab
from eagle.questions import Question

pytestmark = pytest.mark.by_hand

FIRST = int(os.environ.get("MSD_SERVING_QUESTIONS", "12"))


def copy_with(draft: Path, folder: Path, **changes: object) -> Path:
    """A copy of an exported draft with other settings in its section "msd"."""
    shutil.copytree(draft, folder)
    config = json.loads((folder / "config.json").read_text())
    config["msd"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_chain_is_ours(pair: Pair, questions: list[Question], run_engine: Run) -> None:
    ours = pair.answers(questions[:FIRST])
    found = run_engine(pair, [pair.request(each) for each in questions[:FIRST]])
    assert found["counters"]["num_accepted_tokens_per_pos"] == ours.accepted
    assert found["counters"]["num_drafts"] == ours.drafts
    assert found["ids"] == ours.ids


def test_without_the_mask_of_pictures_fewer_tokens_are_accepted(
    pair: Pair, questions: list[Question], run_engine: Run, tmp_path: Path
) -> None:
    """As in our loop with the same weights and ``"decoupled": false``, so pictures do reach the draft."""
    draft = shutil.copytree(pair.source, tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "msd": {"decoupled": False}}))
    decoupled, coupled = pair.answers(questions[:FIRST]), pair.with_draft(draft, tmp_path / "exported")
    ours = coupled.answers(questions[:FIRST])
    found = run_engine(coupled, [pair.request(each) for each in questions[:FIRST]])
    assert found["counters"]["num_accepted_tokens_per_pos"] == ours.accepted
    assert found["ids"] == decoupled.ids == ours.ids  # a worse draft costs speed only
    assert found["counters"]["num_drafts"] == ours.drafts > decoupled.drafts


def test_batches_chunked_prefill_and_prefix_caching_give_the_same_answers(
    pair: Pair, questions: list[Question], run_engine: Run
) -> None:
    picked = [questions[number] for number in (0, 15, 1, 31, 2, 3)]  # 15 and 31 have no picture
    assert [bool(each.images) for each in picked] == [True, False, True, False, True, True]
    ids = pair.answers(picked).ids
    requests = [pair.request(each) for each in picked]
    found = run_engine(
        pair, requests * 2, together=True, max_num_seqs=4, max_num_batched_tokens=128, enable_chunked_prefill=True,
        enable_prefix_caching=True, block_size=32,
    )  # fmt: skip
    assert max(found["prompt_lengths"]) > 128  # so a prompt is read in pieces
    assert found["counters"]["prefix_cache_hits"] > 0
    assert found["counters"]["num_accepted_tokens"] > 0
    assert found["ids"] == ids * 2


def test_two_processes_share_the_tensors(pair: Pair, questions: list[Question], run_engine: Run) -> None:
    """Tensor parallelism. Sums of two halves are rounded otherwise, so drafts may differ where tokens are close."""
    vision = pair.msd.target.config.vision_config
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    if heads % 2:
        pytest.skip(f"two processes cannot share the {heads} heads of this vision tower")
    ours = pair.answers(questions[:4])
    found = run_engine(
        pair, [pair.request(each) for each in questions[:4]], tensor_parallel_size=2, distributed_executor_backend="mp"
    )
    assert found["ids"] == ours.ids
    assert found["counters"]["num_accepted_tokens_per_pos"] == pytest.approx(ours.accepted, abs=2)


def test_a_trimmed_vocabulary_drafts_as_in_our_loop(
    pair: Pair, questions: list[Question], run_engine: Run, tmp_path: Path
) -> None:
    draft = shutil.copytree(pair.source, tmp_path / "draft")
    ids = pair.answers(questions[:4]).ids
    write_draft_vocab(draft, torch.tensor(sorted({token for answer in ids[:2] for token in answer})))
    trimmed = pair.with_draft(draft, tmp_path / "exported")
    ours = trimmed.answers(questions[:4])
    found = run_engine(trimmed, [pair.request(each) for each in questions[:4]])
    assert ours.ids == ids == found["ids"]
    assert found["counters"]["num_accepted_tokens_per_pos"] == ours.accepted


def test_without_a_draft_vllm_is_not_changed(pair: Pair, questions: list[Question], run_engine: Run) -> None:
    ids = pair.answers(questions[:3]).ids
    found = run_engine(pair, [pair.request(each) for each in questions[:3]], draft=None)
    assert found["ids"] == ids and found["counters"].get("num_drafts", 0) == 0
    assert not found["wrapped"]


@pytest.mark.parametrize("change", [{"family": "other"}, {"vocabulary": True}], ids=["family", "vocabulary"])
def test_a_draft_of_another_base_is_refused_at_start(
    pair: Pair, questions: list[Question], run_engine: Run, tmp_path: Path, change: dict
) -> None:
    if "family" in change:
        family = "llava" if "qwen" in pair.msd.target.family else "qwen2_vl"
        draft = copy_with(pair.draft, tmp_path / "other", family=family, targets=[family])
        words = f"family {family} in the draft"
    else:
        draft, words = copy_with(pair.draft, tmp_path / "other"), "vocabulary 2000 in the draft, 2048 in the base"
        config = json.loads((draft / "config.json").read_text())
        (draft / "config.json").write_text(json.dumps({**config, "vocab_size": 2000}))
    with pytest.raises(RuntimeError, match=f"ValueError: the MSD draft does not fit the base model: {words}"):
        run_engine(pair, [pair.request(questions[0])], draft=draft)

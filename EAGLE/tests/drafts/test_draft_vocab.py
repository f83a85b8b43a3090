"""A draft that drafts from a part of the vocabulary: same answers, fewer rows of the head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian

from eagle import MSDModel, TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.config import DRAFT_VOCAB_FILE
from eagle.drafts.draft_vocab import write_draft_vocab
from eagle.families import load_target
from eagle.ge_data import vocabulary
from eagle.ge_data.vocabulary import most_frequent
from llava import load_processor
from llava.errors import UserError, run_cli


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_liuhaotian(tmp_path / "base")


@pytest.fixture
def draft(base: Path, tmp_path: Path) -> Path:
    return make_draft(tmp_path / "draft", load_target(base, dtype=torch.float32), agree=1.0)


def test_answers_do_not_change_and_drafted_tokens_are_of_the_part(base: Path, draft: Path) -> None:
    whole = MSDModel.from_pretrained(base, draft, dtype=torch.float32)
    inputs = whole.target.prepare(whole.target.chat_prompt("How many?", num_images=1), [make_image()])
    settings = {"max_new_tokens": 40, "temperature": 0.0, "tree": TreeConfig(3, 4, 16)}
    wanted = whole.generate(**inputs, **settings)
    said = wanted.sequences[0, inputs["input_ids"].shape[1] :].unique()
    write_draft_vocab(draft, said)
    trimmed = MSDModel.from_pretrained(base, draft, dtype=torch.float32)
    assert trimmed.draft is not None and trimmed.draft.draft_vocab is not None
    assert trimmed.draft.draft_vocab.tolist() == said.tolist()
    output = trimmed.generate(**inputs, **settings)
    assert torch.equal(output.sequences, wanted.sequences)
    assert output.stats.tau >= wanted.stats.tau  # only what is said is drafted
    hidden = torch.randn(2, 5, trimmed.target.hidden_size)
    ids, logprobs = trimmed.draft.likely_next(hidden, 4, trimmed.target.head)
    assert set(ids.flatten().tolist()) <= set(said.tolist())
    rows = trimmed.target.head(hidden)[..., said].log_softmax(-1)
    assert torch.allclose(logprobs, rows.topk(4).values, atol=1e-5)
    trimmed.draft.prepare_for_decoding(trimmed.target.model.get_output_embeddings(), cap=0.5)
    _, logprobs = trimmed.draft.likely_next(hidden, 4, trimmed.target.head)
    rows = (0.5 * (trimmed.target.head(hidden)[..., said] / 0.5).tanh()).log_softmax(-1)
    assert torch.allclose(logprobs, rows.topk(4).values, atol=1e-5)


def test_the_most_frequent_tokens_that_occur() -> None:
    counts = torch.tensor([0, 5, 1, 0, 3, 1])
    tokens, share = most_frequent(counts, 2)
    assert tokens.tolist() == [1, 4] and share == pytest.approx(0.8)
    assert most_frequent(counts, 6)[0].tolist() == [1, 4, 2, 5]


def test_tokens_of_annotation_files(
    base: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of answers and their end, without the base's weights; records that cannot be used do not count."""
    talk = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "two two rivers"}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": talk}, {"conversations": "broken"}]))
    tokenizer = load_processor(base).tokenizer
    for weights in base.glob("*model*.bin"):
        weights.unlink()
    flags = ["--draft", str(draft), "--annotations", str(tmp_path / "data.json"), "--base", str(base)]
    assert run_cli(lambda: vocabulary.main(flags)) == 0
    wanted = {*tokenizer("two two rivers", add_special_tokens=False).input_ids, tokenizer.eos_token_id}
    found = load_draft(draft).draft_vocab
    assert found is not None and set(found.tolist()) == wanted
    assert f"{len(wanted)} of " in capsys.readouterr().out
    for wrong in (flags[:2], flags[:4], [*flags[:2], *flags[4:]]):
        assert run_cli(lambda wrong=wrong: vocabulary.main(wrong)) == 2  # type: ignore[misc]


def test_a_packed_head_has_no_rows_to_copy(draft: Path) -> None:
    """As that of a base in 4 bit."""
    write_draft_vocab(draft, torch.tensor([3, 4]))
    packed = torch.nn.Module()
    packed.weight = torch.zeros(64, 1, dtype=torch.uint8)  # type: ignore[assignment]
    with pytest.raises(UserError, match="lm_head, which is packed"):
        load_draft(draft).prepare_for_decoding(packed)


@pytest.mark.parametrize("broken", ["missing", "no safetensors", "outside", "empty"])
def test_a_broken_part_is_one_clear_line(draft: Path, broken: str) -> None:
    write_draft_vocab(draft, torch.tensor([3, 4]))
    path = draft / DRAFT_VOCAB_FILE
    if broken == "missing":
        path.unlink()
    elif broken == "no safetensors":
        path.write_bytes(b"{}")
    else:
        save_file({"tokens": torch.tensor([10**6] if broken == "outside" else [], dtype=torch.int32)}, path)
    with pytest.raises(UserError, match="trimmed vocabulary"):
        load_draft(draft)

"""Block heads: one forward drafts what plain forwards of all rows draft, and answers are those of the target alone."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_draft import make_draft
from tiny_llava import make_llava_hf
from tiny_questions import QUESTIONS, answer_alone, prepared
from tiny_stock import make_qwen

from eagle import MSDModel, TreeConfig
from eagle.decode.block import BlockDrafter
from eagle.decode.drafter import Drafter
from eagle.decode.tree import select_nodes
from eagle.doctor.models import check_draft
from eagle.drafts.block import BlockDraft
from eagle.drafts.checkpoint import load_draft, load_msd_draft
from eagle.drafts.compression import Compression
from eagle.drafts.draft_vocab import write_draft_vocab
from eagle.drafts.head import Prompt
from eagle.exactness import check_prompt, significant
from eagle.families import load_target
from eagle.serving.draft import portable
from llava import UserError

BASES = {"llava": make_llava_hf, "qwen2_vl": make_qwen}
SIZE = 4
MROPE = {"msd": {"positions": "mrope"}, "rope_scaling": {"mrope_section": [1, 1, 2]}}
TREE, CHAIN = TreeConfig(3, 4, 16), TreeConfig(3, 1, 5)
TOKENS = 20


@pytest.fixture(scope="module", params=BASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    target = load_target(BASES[request.param](folder / "base"), dtype=torch.float32)
    changes = MROPE if request.param == "qwen2_vl" else {}
    head = make_draft(folder / "draft", target, agree=1.0, block={"size": SIZE, "layers": 2}, **changes)
    answers = [alone(target, question) for question in QUESTIONS]
    write_draft_vocab(head, torch.tensor(answers).unique())  # so that some drafted tokens are right
    return SimpleNamespace(target=target, folder=head, model=MSDModel(target, load_draft(head, torch.float32), TREE))


def alone(target, question):
    return answer_alone(target, question, TOKENS)


TREES = [TREE, CHAIN, TreeConfig(0, 3, 4), TreeConfig(1, 2, 6), TreeConfig(7, 2, 12)]
"""The last is deeper than the block."""


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_greedy_answers_equal_generate(pair, tree):
    accepted = 0
    for question in QUESTIONS[:2]:
        output = pair.model.generate(
            **prepared(pair.target, [question]), temperature=0.0, max_new_tokens=TOKENS, tree=tree
        )
        assert output.tokens[0] == alone(pair.target, question)
        accepted += sum(output.stats.accept_lengths)
    assert accepted > 0 or tree is not TREE  # a head that is never right would prove little


@pytest.mark.parametrize("tree", [TREE, CHAIN], ids=str)
def test_batches_equal_the_rows_alone(pair, tree):
    inputs = prepared(pair.target, QUESTIONS)
    output = pair.model.generate(**inputs, temperature=0.0, max_new_tokens=TOKENS, tree=tree)
    assert output.tokens == [alone(pair.target, question) for question in QUESTIONS]


def test_adaptive_trees(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path))
    model = MSDModel(pair.target, load_draft(pair.folder, torch.float32), "auto")
    output = model.generate(**prepared(pair.target, QUESTIONS[:1]), temperature=0.0, max_new_tokens=TOKENS)
    assert output.tokens[0] == alone(pair.target, QUESTIONS[0])


def test_sampled_answers_by_seed_equal_plain_ones(pair):
    inputs = prepared(pair.target, QUESTIONS)
    settings = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": TOKENS, "seed": 5}
    plain = pair.model.generate(**inputs, use_msd=False, **settings)
    output = pair.model.generate(**inputs, **settings)
    assert output.tokens == plain.tokens and sum(output.stats.accept_lengths) > 0


def test_samples_have_the_distribution_of_the_target(pair):
    settings = {"T 1.0": {"temperature": 1.0}, "T 0.3, top-p 0.8": {"temperature": 0.3, "top_p": 0.8}}
    fits = check_prompt(pair.model, prepared(pair.target, QUESTIONS[:1]), TREE, 5000, settings=settings)
    assert len(fits) > 3 and not significant(fits)


def started(pair, tree, batch=1, rows=(0,), kind=BlockDrafter):
    """A drafter that has read prompts, and for each the inputs, prefill and first token."""
    drafter, read = kind(pair.model.draft, pair.target.head, 200, tree, batch), []
    for place, row in enumerate(rows):
        inputs = prepared(pair.target, [QUESTIONS[row]])
        prefill, first = pair.target.prefill(inputs), torch.tensor([7 + row])
        drafter.start(place, prefill, inputs["input_ids"], first)
        read.append((inputs["input_ids"], prefill, first))
    return drafter, read


def accepted_rows(read, count):
    """Any rows that a cycle could have accepted."""
    _, prefill, first = read
    return prefill.features[0, :count], first.repeat(count)


def plainly(pair, read, parts) -> torch.Tensor:
    """Log-probabilities [SIZE, V] of the levels behind a prompt and accepted rows, without a cache: for each depth one
    forward over all rows, of which the last is its mask row."""
    draft, (ids, prefill, first) = pair.model.draft, read
    hidden, tokens = (torch.cat(each) for each in zip(accepted_rows(read, 0), *parts, strict=True))
    next_ids = torch.cat([ids[:, 1:], first[None]], dim=1)
    is_image = torch.cat([prefill.image_mask[:, 1:], torch.zeros(1, 1, dtype=torch.bool)], dim=1)
    embeds = prefill.embeds.roll(-1, dims=1)
    prompt = Prompt(prefill.features, next_ids, is_image, embeds, prefill.positions, prefill.next_position)
    rows = draft.read_prompt(prompt, Compression())
    x = torch.cat([rows.x, draft.text_rows(hidden[None], tokens[None])], dim=1)
    before = torch.arange(rows.x.shape[1])[None] if rows.positions is None else rows.positions
    count = len(tokens)
    following = rows.x.shape[1] if rows.next_position is None else rows.next_position
    levels = []
    for depth in range(SIZE):
        masks = [x[:, -1:] + draft.mask_rows[place] for place in range(depth)]
        new = following + torch.arange(count + depth)
        positions = torch.cat([before, new.expand(*before.shape[:-1], -1)], dim=-1)
        output = draft(torch.cat([x, *masks], dim=1), positions)[0, -1]
        logits = pair.target.head(output)
        trimmed = torch.full_like(logits, -torch.inf).index_copy(0, draft.draft_vocab, logits[draft.draft_vocab])
        levels.append(trimmed.log_softmax(-1))
    return torch.stack(levels)


@pytest.mark.parametrize("count", [0, 3])
@torch.inference_mode()
def test_one_forward_drafts_what_plain_forwards_draft(pair, count):
    """Behind the prompt, and behind accepted rows twice: no mask row stays in the cache."""
    drafter, (read,) = started(pair, TREE)
    parts = [accepted_rows(read, count), accepted_rows(read, 1)] if count else []
    for hidden, tokens in parts:
        drafter.extend([hidden], [tokens])
        drafter.expand(TREE)
    found = drafter.expand(TREE).of(0)
    assert drafter.cache.lengths == [read[0].shape[1] + sum(len(tokens) for _, tokens in parts)]
    logprobs = plainly(pair, read, parts)
    levels, parents = [], found.parents.tolist()
    for node, parent in enumerate(parents):
        levels.append(0 if parent < 0 else levels[parent] + 1)
        own = logprobs[levels[node], found.tokens[node]]
        before = 0.0 if parent < 0 else found.scores[parent]
        torch.testing.assert_close(found.scores[node], own + before, atol=1e-4, rtol=1e-4)
    assert max(levels) == SIZE - 1 and found.tokens[: TREE.top_k].tolist() == logprobs[0].topk(4).indices.tolist()


@torch.inference_mode()
def test_the_tree_has_the_most_probable_nodes_of_the_product(pair):
    drafter, (read,) = started(pair, TREE)
    values, tokens = plainly(pair, read, []).topk(TREE.top_k)  # [SIZE, k]
    nodes = {
        tuple(int(tokens[level, each]) for level, each in enumerate(path)): float(sum(values[range(len(path)), path]))
        for length in range(1, SIZE + 1)
        for path in itertools.product(range(TREE.top_k), repeat=length)
    }
    best = sorted(nodes, key=nodes.__getitem__, reverse=True)[:6]
    tree = select_nodes(drafter.expand(TREE).of(0), torch.tensor(7), 7)
    paths = [tuple(tree.tokens[row.nonzero()[1:, 0]].tolist()) for row in tree.mask[1:]]
    assert set(paths) == set(best)


@torch.inference_mode()
def test_a_batch_drafts_what_each_sequence_drafts_alone(pair):
    """Though they have accepted different numbers of rows, and one of them leaves the batch."""
    batch, read = started(pair, TREE, 3, (0, 1, 2))
    counts = (1, 4, 2)
    parts = [accepted_rows(each, count) for each, count in zip(read, counts, strict=True)]
    single = [started(pair, TREE, rows=(row,))[0] for row in range(3)]
    first = batch.expand(TREE)
    for row, drafter in enumerate(single):
        torch.testing.assert_close(first.of(row).scores, drafter.expand(TREE).of(0).scores, atol=1e-4, rtol=1e-4)
        drafter.extend([parts[row][0]], [parts[row][1]])
    batch.extend(*zip(*parts, strict=True))
    assert batch.cache.lengths == [drafter.cache.lengths[0] for drafter in single]
    batch.select([0, 2])
    together = batch.expand(TREE)
    for place, row in enumerate((0, 2)):
        found = single[row].expand(TREE).of(0)
        assert torch.equal(together.of(place).tokens, found.tokens)
        torch.testing.assert_close(together.of(place).scores, found.scores, atol=1e-4, rtol=1e-4)


def test_one_forward_a_cycle(pair, monkeypatch):
    """Of several rows; an MSD draft needs one for each level."""
    forward, calls = BlockDraft.forward, []

    def counted(self, x, *more, **named):
        calls.append(x.shape[1])
        return forward(self, x, *more, **named)

    monkeypatch.setattr(BlockDraft, "forward", counted)
    output = pair.model.generate(**prepared(pair.target, QUESTIONS[1:2]), temperature=0.0, max_new_tokens=TOKENS)
    assert len(calls) == output.stats.cycles  # also one for the prompt; none after the last two cycles
    assert calls[1] == SIZE - 1 and all(SIZE <= count <= 2 * SIZE for count in calls[2:])


def changed(pair, folder, name=None, **block):
    """A copy of the head with another section "block", or without the tensor ``name``."""
    folder.mkdir()
    config = {**json.loads((pair.folder / "config.json").read_text()), "msd": {}}
    (folder / "config.json").write_text(json.dumps({**config, "block": {**config["block"], **block}}))
    tensors = load_file(pair.folder / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    return folder


def test_loading_is_strict(pair, tmp_path):
    draft = load_draft(pair.folder)
    assert isinstance(draft, BlockDraft) and (draft.block_size, len(draft.layers)) == (SIZE, 2)
    with pytest.raises(UserError, match=r"missing mask_rows"):
        load_draft(changed(pair, tmp_path / "a", "mask_rows"))
    with pytest.raises(UserError, match=r"mask_rows is \[3, 32\], config.json says \[5, 32\]"):
        load_draft(changed(pair, tmp_path / "b", size=6))
    with pytest.raises(UserError, match=r"unknown key 'sizes'.*section 'block'.*did you mean 'size'"):
        load_draft(changed(pair, tmp_path / "c", sizes=6))
    folder = changed(pair, tmp_path / "d")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "block"}))
    with pytest.raises(UserError, match=r"unexpected layers.1.*use a complete MSD draft"):
        load_draft(folder)


def test_what_other_kinds_have_is_refused(pair):
    draft = load_draft(pair.folder, torch.float32)
    with pytest.raises(UserError, match="block heads are not exported"):
        portable(draft, pair.folder)
    with pytest.raises(UserError, match="msd push takes MSD drafts, not block heads"):
        load_msd_draft(pair.folder, "msd push")


def test_the_doctor_prints_its_conventions(pair):
    found = [check.found for check in check_draft(str(pair.folder), hub=False)[1]]
    assert any("block: " in text and "4 tokens in one forward, by 3 mask rows" in text for text in found)


@torch.inference_mode()
def test_a_drafter_of_levels_would_draft_otherwise(pair):
    """The other drafter feeds predictions back, which this head was not made for."""
    block, levels = (started(pair, CHAIN, kind=kind)[0].expand(CHAIN) for kind in (BlockDrafter, Drafter))
    assert block.scores[0, 0] == pytest.approx(float(levels.scores[0, 0]), abs=1e-4)
    assert not torch.allclose(block.scores, levels.scores, atol=1e-3)

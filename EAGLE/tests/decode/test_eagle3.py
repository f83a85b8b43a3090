"""EAGLE-3 heads: same answers as the target alone, whatever the layout, tree, batch and conventions."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_eagle3 import make_eagle3
from tiny_families import make_qwen3_vl
from tiny_llava import make_image, make_llava_hf
from tiny_questions import QUESTIONS, answer_alone, prepared
from tiny_stock import make_qwen
from torch._dynamo.utils import counters

from eagle import MSDModel, TreeConfig
from eagle.decode.drafter import Drafter, window_mask
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from llava import UserError

BASES = {
    "qwen3_vl": make_qwen3_vl,
    "qwen2_5_vl": lambda folder: make_qwen(folder, version="2.5", num_hidden_layers=3),
    "llava": make_llava_hf,
}
TREE, CHAIN = TreeConfig(3, 4, 16), TreeConfig(3, 1, 5)
TOKENS = 20


@pytest.fixture(scope="module", params=BASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    target = load_target(BASES[request.param](folder / "base"), dtype=torch.float32)
    return SimpleNamespace(target=target, folder=folder)


def model_of(pair, tree=TREE, **changes) -> MSDModel:
    """With a random head. Its vocabulary has the tokens of an answer, so that some drafted ones are right."""
    if "vocabulary" not in changes:
        changes["vocabulary"] = alone(pair.target, QUESTIONS[0])
    folder = make_eagle3(pair.folder / f"draft{len(list(pair.folder.iterdir()))}", pair.target, **changes)
    return MSDModel(pair.target, load_draft(folder, dtype=torch.float32), tree)


def alone(target, question):
    return answer_alone(target, question, TOKENS)


SECTION = {"rope_type": "default", "mrope_section": [2, 1, 1]}
HEADS = {
    "flat": {},
    "speculators": {"layout": "speculators"},
    "two layers, window": {
        "layout": "speculators", "num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 4, "use_sliding_window": True,
    },
    "norms": {
        "layout": "speculators", "norm_before_residual": True, "fc_norm": True, "norm_output": True,
        "shapes": {f"fc_norm.{index}.weight": (32,) for index in range(3)},
    },
    "mrope, features": {"rope_scaling": SECTION, "msd": {"image_rows": "feature"}},
    "mrope, merged features": {"rope_scaling": SECTION, "msd": {"image_rows": "feature", "image_tokens": 2}},
    "merged placeholders": {"msd": {"image_tokens": 1, "positions": "temporal"}},
    "mrope interleaved": {"rope_scaling": {**SECTION, "mrope_interleaved": True}},
    "temporal": {"msd": {"positions": "temporal"}},
    "target's head": {"drop": ("lm_head.weight",)},
    "whole vocabulary": {"drop": ("lm_head.weight", "d2t", "t2d"), "draft_vocab_size": None},
}  # fmt: skip


CORE = [("qwen3_vl", head) for head in HEADS] + [("qwen2_5_vl", "mrope, features"), ("llava", "flat")]


@pytest.mark.parametrize(
    ("pair", "head"),
    [
        pytest.param(base, head, marks=[] if (base, head) in CORE else [pytest.mark.slow])
        for base in BASES
        for head in HEADS
    ],
    indirect=["pair"],
)
def test_greedy_answers_equal_generate(pair, head):
    model, inputs = model_of(pair, **dict(HEADS[head])), prepared(pair.target, QUESTIONS[:1])
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=TOKENS)
    assert output.tokens[0] == alone(pair.target, QUESTIONS[0])
    assert sum(output.stats.accept_lengths) > 0 or head == "whole vocabulary"


@pytest.mark.parametrize(
    ("pair", "head", "plainly"),
    [
        *(pytest.param(base, head, False, marks=pytest.mark.slow) for base in BASES for head in HEADS),
        *(("qwen3_vl", head, True) for head in ("flat", "two layers, window", "mrope, merged features")),
    ],
    indirect=["pair"],
)
def test_compiled_decoding_has_the_same_cycles(pair, head, plainly, monkeypatch):
    """The streams of the target's layers leave the compiled forward. After the warm-up nothing is compiled.
    ``plainly``: without compiling at all."""
    model = model_of(pair, **dict(HEADS[head]))
    torch._dynamo.reset()
    counters.clear()
    if plainly:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiled = MSDModel(pair.target, model.draft, model.tree, compile="eager")
    compiled.warm_up(progress=False, batch_sizes=[1, len(QUESTIONS)])
    before = counters["stats"]["unique_graphs"]
    for question in QUESTIONS:
        inputs = prepared(pair.target, [question])
        plain, found = (
            each.generate(**inputs, temperature=0.0, max_new_tokens=TOKENS, tree=TREE) for each in (model, compiled)
        )
        assert found.tokens == plain.tokens and found.stats.accept_lengths == plain.stats.accept_lengths
    batch = {**prepared(pair.target, QUESTIONS), "temperature": 0.0, "max_new_tokens": TOKENS}
    assert compiled.generate(**batch).tokens == model.generate(**batch).tokens
    assert counters["stats"]["unique_graphs"] == before and not counters["graph_break"]
    assert pair.target._streams.traced is None


def test_chains_and_prompts_without_pictures(pair):
    model, accepted = model_of(pair), 0
    for question in QUESTIONS:
        for tree in (TREE, CHAIN):
            output = model.generate(
                **prepared(pair.target, [question]), temperature=0.0, max_new_tokens=TOKENS, tree=tree
            )
            assert output.tokens[0] == alone(pair.target, question)
            accepted += sum(output.stats.accept_lengths)
    assert accepted > 0  # else a draft that is never right would pass


def test_batches_equal_the_rows_alone(pair):
    model = model_of(pair, layout="speculators")
    expected = [alone(pair.target, question) for question in QUESTIONS]
    inputs = prepared(pair.target, QUESTIONS)
    assert model.generate(**inputs, temperature=0.0, max_new_tokens=TOKENS).tokens == expected


def test_custom_generate(pair):
    model, inputs = model_of(pair), prepared(pair.target, QUESTIONS[:1])
    inputs |= pair.target.complete_inputs(inputs["input_ids"], inputs)
    settings = {"do_sample": False, "max_new_tokens": TOKENS}
    expected = pair.target.model.generate(**inputs, **settings)
    assert pair.target.model.generate(**inputs, **settings, custom_generate=model).tolist() == expected.tolist()


def test_sampled_answers_by_seed_equal_plain_ones(pair):
    model = model_of(pair)
    inputs = prepared(pair.target, QUESTIONS)
    settings = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": TOKENS, "seed": 5}
    plain = model.generate(**inputs, use_msd=False, **settings)
    assert model.generate(**inputs, **settings).tokens == plain.tokens


def test_adaptive_trees(pair, tmp_path, monkeypatch):
    """The costs of the head are measured, so features of several layers are drafted from there too."""
    monkeypatch.setenv("MSD_CACHE", str(tmp_path))
    model = model_of(pair, tree="auto")
    output = model.generate(**prepared(pair.target, QUESTIONS[:1]), temperature=0.0, max_new_tokens=TOKENS)
    assert output.tokens[0] == alone(pair.target, QUESTIONS[0])


@pytest.mark.parametrize("pair", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize("head", ["flat", "two layers, window", "mrope interleaved", "norms"])
@torch.inference_mode()
def test_the_cache_changes_nothing(pair, head):
    """A chain of the drafter equals one that reads the whole sequence again for each token."""
    draft = model_of(pair, **dict(HEADS[head])).draft
    inputs = prepared(pair.target, QUESTIONS[:1])
    prefill = pair.target.prefill(inputs, draft.target_layers)
    count, tree = inputs["input_ids"].shape[1], TreeConfig(5, 1, 7)
    first = pair.target.head(prefill.hidden[:, -1]).argmax(-1)
    drafter = Drafter(draft, pair.target.head, count + 20, tree)
    drafter.start(0, prefill, inputs["input_ids"], first)
    accepted = [prefill.features[0, :3], first.repeat(3)]
    drafter.extend([accepted[0]], [accepted[1]])  # any rows: three more accepted ones
    found = drafter.expand(tree).of(0).tokens

    hidden = torch.cat([draft.condense(prefill.features), draft.condense(accepted[0][None])], dim=1)
    tokens = torch.cat([inputs["input_ids"][:, 1:], first[None], accepted[1][None]], dim=1)
    start = prefill.positions if draft.config.positions == "mrope" else torch.arange(count)[None]
    following = int(prefill.next_position) if draft.config.positions == "mrope" else count
    for step in range(tree.depth + 1):
        rows = draft.text_rows(hidden, tokens)
        more = following + torch.arange(rows.shape[1] - count)
        positions = torch.cat([start, more.expand(*start.shape[:-1], -1)], dim=-1)
        mask = None if draft.window is None else window_mask(rows.shape[1], draft.window, rows.device)
        output = draft(rows, positions, mask)[:, -1:]
        token = draft.likely_next(output[:, 0], 1, pair.target.head)[0]
        assert token.item() == found[step].item()
        hidden, tokens = torch.cat([hidden, output], dim=1), torch.cat([tokens, token], dim=1)


def test_streams_are_those_of_the_own_thread(pair):
    """Two threads with prompts of different lengths, one of them without streams."""
    found, errors = {}, []
    barrier = threading.Barrier(3)

    def read(name, question, layers):
        try:
            inputs = prepared(pair.target, [question])
            barrier.wait(timeout=30)
            with torch.inference_mode():
                for _ in range(5):
                    prefill = pair.target.prefill(inputs, layers)
                    found.setdefault(name, []).append((inputs["input_ids"].shape[1], prefill.streams))
        except Exception as error:
            errors.append(error)

    jobs = [("a", QUESTIONS[0], (0, 2)), ("b", QUESTIONS[1], (1,)), ("c", QUESTIONS[2], ())]
    threads = [threading.Thread(target=read, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    size = pair.target.hidden_size
    assert all(tuple(streams.shape) == (1, length, 2 * size) for length, streams in found["a"])
    assert all(tuple(streams.shape) == (1, length, size) for length, streams in found["b"])
    assert all(streams is None for _, streams in found["c"])


@pytest.mark.parametrize("pair", ["qwen3_vl"], indirect=True)
@torch.inference_mode()
def test_deepstack_is_part_of_the_streams(pair):
    """A layer's output before the addition differs in image rows."""
    outputs: list = []
    hook = pair.target.text_model.layers[0].register_forward_hook(lambda module, given, out: outputs.append(out))
    prefill = pair.target.prefill(prepared(pair.target, QUESTIONS[:1]), (1,))
    hook.remove()
    change = (prefill.features - outputs[0]).abs().amax(dim=-1)[0]  # [S]
    assert torch.equal(change > 0, prefill.image_mask[0])


@torch.inference_mode()
def test_streams_are_the_residual_stream(pair):
    """Stream 0 is the input embeddings, and the final norm of stream N is the hidden state."""
    layers = len(pair.target.text_model.layers)
    prefill = pair.target.prefill(prepared(pair.target, QUESTIONS[:1]), (0, layers))
    first, last = prefill.features.chunk(2, dim=-1)
    torch.testing.assert_close(first, prefill.embeds)
    torch.testing.assert_close(pair.target.text_model.norm(last), prefill.hidden)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hidden_size": 16}, "hidden size 16 in the draft, 32 in the base"),
        ({"vocab_size": 9999}, "vocabulary"),
        ({"msd": {"target_layers": [0, 1, 40]}}, "layers 0, 1, 40 of a target of"),
    ],
)
def test_a_head_of_another_base_is_refused(pair, changes, message):
    if "vocab_size" in changes or "target_hidden_size" in changes:
        changes = {**changes, "drop": ("t2d",)}
    shapes = {"fc.weight": (32, 48)} if "target_hidden_size" in changes else {}
    with pytest.raises(UserError, match=message):
        model_of(pair, shapes=shapes, **changes)


def test_an_image_id_without_an_embedding_is_refused(pair):
    config = pair.target.config
    own, config.image_token_id = config.image_token_id, 10**6
    try:
        with pytest.raises(UserError, match="image_rows"):
            model_of(pair, vocabulary=None)
        model_of(pair, vocabulary=None, msd={"image_rows": "feature"})
    finally:
        config.image_token_id = own


SIZES = [(60, 50), (112, 60), (56, 100)]
MERGED_SLOW = [("llava", "feature"), ("qwen2_5_vl", "token")]


@torch.inference_mode()
def cached_rows(model, inputs) -> int:
    """Rows of the draft's cache behind the prompt."""
    prefill = model.target.prefill(inputs, model.draft.target_layers)
    length = inputs["input_ids"].shape[1]
    drafter = Drafter(model.draft, model.target.head, length, TREE)
    drafter.start(0, prefill, inputs["input_ids"], torch.tensor([7]))
    return drafter.cache.length


@pytest.mark.parametrize(
    ("pair", "rows"),
    [
        pytest.param(base, rows, marks=[pytest.mark.slow] if (base, rows) in MERGED_SLOW else [])
        for base in BASES
        for rows in ("token", "feature")
    ],
    indirect=["pair"],
)
def test_merged_image_rows(pair, rows):
    """With no, one and three pictures of different sizes: trees, chains, samples and a batch."""
    options = {"image_rows": rows, "image_tokens": 3}
    model = model_of(pair, rope_scaling=SECTION, msd=options)
    whole = model_of(pair, rope_scaling=SECTION, msd={"image_rows": rows})
    chosen = MSDModel(pair.target, whole.draft, TREE, draft_image_tokens=3)
    target, expected, accepted, settings = pair.target, [], 0, {"temperature": 0.0, "max_new_tokens": TOKENS}
    prompts = [target.chat_prompt("Which is larger?", num_images=count) for count in (0, 1, 3)]
    images = [make_image(width=width, height=height, seed=width) for width, height in SIZES]
    for prompt, count in zip(prompts, (0, 1, 3), strict=True):
        inputs = target.prepare(prompt, images[:count])
        pictures, length = int(target.prefill(inputs).image_mask.sum()), inputs["input_ids"].shape[1]
        assert cached_rows(model, inputs) == length - pictures + 3 * count
        assert cached_rows(whole, inputs) == length
        inputs |= target.complete_inputs(inputs["input_ids"], inputs)
        answer = target.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, length:].tolist()
        expected.append(answer)
        for tree in (TREE, CHAIN):
            found, same = (each.generate(**inputs, tree=tree, **settings) for each in (model, chosen))
            assert found.tokens[0] == same.tokens[0] == answer
            assert found.stats.accept_lengths == same.stats.accept_lengths
            accepted += sum(found.stats.accept_lengths)
    assert accepted > 0
    together = target.prepare(prompts, [images[0], *images])
    assert model.generate(**together, **settings).tokens == expected
    sampled = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": TOKENS, "seed": 5}
    assert model.generate(**together, **sampled).tokens == model.generate(**together, use_msd=False, **sampled).tokens

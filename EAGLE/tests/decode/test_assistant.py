"""Gemma 4's assistants: the drafts of transformers' own class, and the same answers as the target alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_assistant import make_assistant
from tiny_families import make_gemma3, make_gemma4
from tiny_llava import make_image
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation import candidate_generator

from eagle import MSDModel, TreeConfig
from eagle.decode.assistant import AssistantDrafter
from eagle.decode.block import drafter_of
from eagle.doctor.models import check_draft, check_pair
from eagle.drafts.assistant import AssistantOptions
from eagle.drafts.checkpoint import kind_of, load_draft
from eagle.families import family_named, load_target
from eagle.serving.draft import portable
from llava.errors import UserError

CHAIN, TREE, LENGTH = TreeConfig(4, 1, 6), TreeConfig(3, 3, 10), 24
QUESTIONS = [("Which is larger?", 2), ("Hi", 0), ("How many shapes are there?", 1)]
ORDERED = {"use_ordered_embeddings": True, "num_centroids": 4, "centroid_intermediate_top_k": 2}
PAIRS = {"small": ({}, {}), "plain": ({"vocab_size": 400}, ORDERED), "unified": ({}, {})}
"""Settings of base and assistant."""


@pytest.fixture(scope="module", autouse=True)
def needs_the_model():
    try:
        family_named("gemma4_unified").target_class()
        transformers.Gemma4UnifiedAssistantConfig  # noqa: B018
    except (ImportError, AttributeError) as error:  # an older transformers
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["small", "plain", pytest.param("unified", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory, needs_the_model):
    """A base and its assistant. That of "plain" has ordered embeddings."""
    folder = tmp_path_factory.mktemp("pair")
    text, settings = PAIRS[request.param]
    base = make_gemma4(folder / "base", kind=request.param, **text)
    own = make_assistant(base, folder / "draft", **settings)
    target = load_target(base, dtype=torch.float32)
    target.model.generation_config.eos_token_id = None
    stock = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    draft = load_draft(own, dtype=torch.float32)
    model = MSDModel(target, draft, CHAIN)
    return SimpleNamespace(base=base, own=own, target=target, draft=draft, stock=stock, model=model)


def prepared(target, questions):
    prompts = [target.chat_prompt(text, num_images=count) for text, count in questions]
    images = [make_image(seed=seed) for _, count in questions for seed in range(count)]
    return target.prepare(prompts if len(prompts) > 1 else prompts[0], images)


def drafted(pair, inputs, first, tree):
    """What the drafter grows after a prompt and the token ``first``."""
    target, count = pair.target, inputs["input_ids"].shape[1]
    cache = target.new_cache(1, count + tree.total_tokens)
    drafter = drafter_of(pair.draft, target.head, count + 8, tree, target_cache=lambda: cache)
    for prefill in target.prefill_each(inputs, cache):
        drafter.start(0, prefill, inputs["input_ids"], first)
    return drafter.expand(tree).of(0)


class Stock:
    """transformers' assistant after a prompt that transformers' target has read."""

    def __init__(self, pair, inputs, back: int = 0, rows: int | None = None) -> None:
        """``back``: of the queries' position; ``rows``: that sliding layers are given, None for all."""
        model, ids = pair.target.model, inputs["input_ids"]
        inputs = {**inputs, **pair.target.complete_inputs(ids, inputs)}
        read = model(**inputs, output_hidden_states=True, return_shared_kv_states=True)
        self.states = dict(read.shared_kv_states)
        if rows is not None:
            self.states["sliding_attention"] = tuple(part[:, :, -rows:] for part in self.states["sliding_attention"])
        self.embed, self.hidden = model.get_input_embeddings(), read.hidden_states[-1][:, -1:]
        self.stock, self.positions = pair.stock, torch.tensor([[ids.shape[1] - back]])

    def after(self, tokens: list[int]) -> Tensor:
        """Log-probabilities [V] of the token after these, of which the first is the target's."""
        hidden = self.hidden
        for token in tokens:
            rows = torch.cat([self.embed(torch.tensor([[token]])), hidden], dim=-1)
            output = self.stock(inputs_embeds=rows, position_ids=self.positions, shared_kv_states=self.states)
            hidden = output.last_hidden_state
        logits = output.logits[0, 0]
        if self.stock.masked_embedding is not None:
            logits = logits.masked_fill(logits == logits.min(), -torch.inf)
        return logits.log_softmax(-1)

    def chain(self, first: int, steps: int) -> tuple[list[int], Tensor]:
        tokens, scores = [first], []
        for _ in range(steps):
            logprobs = self.after(tokens)
            tokens.append(int(logprobs.argmax()))
            scores.append(logprobs.max())
        return tokens[1:], torch.stack(scores)


def assert_chain(pair, inputs, stock):
    found = drafted(pair, inputs, torch.tensor([5]), CHAIN)
    tokens, scores = stock.chain(5, CHAIN.depth + 1)
    assert found.tokens.tolist() == tokens
    torch.testing.assert_close(found.scores.diff(prepend=torch.zeros(1)), scores, atol=2e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: f"{question[1]} pictures")
def test_chains_are_those_of_the_stock_class(pair, question):
    inputs = prepared(pair.target, [question])
    assert_chain(pair, inputs, Stock(pair, inputs))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("options", "other"),
    [({"position": "last"}, {"back": 1}), ({"window": "exclusive"}, {"rows": 24}), ({"logit_cap": "config"}, None)],
    ids=str,
)
def test_conventions_are_options(pair, options, other, monkeypatch):
    inputs = prepared(pair.target, QUESTIONS[:1])
    assert inputs["input_ids"].shape[1] > 25  # more rows than a sliding layer sees
    default = drafted(pair, inputs, torch.tensor([5]), CHAIN)
    monkeypatch.setattr(pair.draft, "options", AssistantOptions(**options))
    if other is not None:
        assert_chain(pair, inputs, Stock(pair, inputs, **other))
    ordered = pair.draft.masked_embedding is not None  # whose logits are not capped
    unlike = drafted(pair, inputs, torch.tensor([5]), CHAIN).scores - default.scores
    assert (unlike.abs().max() > 1e-4) == (other is not None or not ordered)


@torch.inference_mode()
def test_nodes_of_a_tree_do_not_see_each_other(pair):
    inputs = prepared(pair.target, QUESTIONS[2:])
    found, stock = drafted(pair, inputs, torch.tensor([5]), TREE), Stock(pair, inputs)
    paths: list[list[int]] = []
    for token, score, parent in zip(found.tokens.tolist(), found.scores, found.parents.tolist(), strict=True):
        before, above = ([5], 0.0) if parent < 0 else (paths[parent], found.scores[parent])
        torch.testing.assert_close(score - above, stock.after(before)[token], atol=2e-5, rtol=0)
        paths.append([*before, token])
    assert len({len(path) for path in paths}) == TREE.depth + 1


def test_candidates_are_those_of_assisted_generation(pair, monkeypatch):
    """The first draft of transformers' own loop. Later ones see rows of rejected tokens there."""
    generator, seen = candidate_generator.SinglePositionMultiTokenCandidateGenerator, []
    get_candidates = generator.get_candidates

    def recorded(self, input_ids, **more):
        ids, logits = get_candidates(self, input_ids, **more)
        seen.append((input_ids.shape[1], ids[0].tolist()))
        return ids, logits

    monkeypatch.setattr(generator, "get_candidates", recorded)
    pair.stock.generation_config.num_assistant_tokens = CHAIN.depth + 1
    for question in QUESTIONS:
        seen.clear()
        inputs = prepared(pair.target, [question])
        complete = {**inputs, **pair.target.complete_inputs(inputs["input_ids"], inputs)}
        pair.target.model.generate(**complete, assistant_model=pair.stock, do_sample=False, max_new_tokens=8)
        count, ids = next((count, ids) for count, ids in seen if len(ids) > count)
        found = drafted(pair, inputs, torch.tensor([ids[count - 1]]), CHAIN)
        assert ids[count:] == found.tokens.tolist()


@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=["chain", "tree"])
def test_answers_equal_generate(pair, tree):
    """Alone and as a batch, greedy."""
    expected = []
    pair.model.tree = tree
    for question in QUESTIONS:
        inputs = prepared(pair.target, [question])
        complete = {**inputs, **pair.target.complete_inputs(inputs["input_ids"], inputs)}
        output = pair.target.model.generate(**complete, do_sample=False, max_new_tokens=LENGTH)
        expected.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        alone = pair.model.generate(**inputs, temperature=0.0, max_new_tokens=LENGTH)
        assert alone.tokens == expected[-1:]
    inputs = prepared(pair.target, QUESTIONS)
    together = pair.model.generate(**inputs, temperature=0.0, max_new_tokens=LENGTH)
    assert together.tokens == expected
    assert sum(together.stats.accept_lengths) > 0  # the assistant drafts some tokens that are kept


@torch.inference_mode()
def test_drafts_after_accepted_tokens_are_those_of_the_whole_text(pair, monkeypatch):
    """At every cycle of an answer, the draft is that after a prompt with the tokens so far."""
    drafts = []
    expand = AssistantDrafter.expand

    def recorded(self, *arguments):
        candidates = expand(self, *arguments)
        drafts.append((int(self._newest[0]), self._target_cache().length, candidates.of(0)))
        return candidates

    monkeypatch.setattr(AssistantDrafter, "expand", recorded)
    pair.model.tree = CHAIN
    inputs = prepared(pair.target, QUESTIONS[1:2])
    answer = pair.model.generate(**inputs, temperature=0.0, max_new_tokens=LENGTH).sequences
    assert len(drafts) > 2
    for newest, length, found in drafts:
        assert newest == int(answer[0, length])
        whole = {"input_ids": answer[:, :length], "attention_mask": torch.ones_like(answer[:, :length])}
        tokens, _ = Stock(pair, whole).chain(newest, len(found.tokens))
        assert found.tokens.tolist() == tokens


def changed(folder, to, **config):
    """A copy of an assistant with other values in its config."""
    to.mkdir()
    known = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(known | config))
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return to


def test_loading_is_strict(pair, tmp_path):
    tensors = load_file(pair.own / "model.safetensors")
    assert "lm_head.weight" not in tensors  # it is the embedding
    assert torch.equal(pair.draft.lm_head.weight, tensors["model.embed_tokens.weight"])
    other = changed(pair.own, tmp_path / "other")
    for name in ("post_projection.weight", "model.layers.1.layer_scalar", "model.embed_tokens.weight"):
        save_file({key: tensors[key] for key in tensors if key != name}, other / "model.safetensors")
        with pytest.raises(UserError, match=f"missing {name.replace('model.embed_tokens', 'lm_head')}"):
            load_draft(other)
    save_file(tensors | {"fc.weight": torch.zeros(2, 2)}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected fc.weight"):
        load_draft(other)
    order = "masked_embedding.token_ordering"
    if order in tensors:
        save_file(tensors | {order: torch.zeros_like(tensors[order])}, other / "model.safetensors")
        with pytest.raises(UserError, match="token_ordering does not have each token once"):
            load_draft(other)
        with pytest.raises(UserError, match=r"num_centroids=3: .* \(must divide the vocabulary"):
            load_draft(changed(pair.own, tmp_path / "centroids", num_centroids=3))
    with pytest.raises(UserError, match=r"unknown key 'windows'.*window"):
        load_draft(changed(pair.own, tmp_path / "unknown", msd={"windows": "inclusive"}))
    with pytest.raises(UserError, match="lacks text_config"):
        load_draft(changed(pair.own, tmp_path / "empty", text_config=None))
    text = json.loads((pair.own / "config.json").read_text())["text_config"] | {"final_logit_softcapping": None}
    with pytest.raises(UserError, match="logit_cap 'config'"):
        load_draft(changed(pair.own, tmp_path / "cap", text_config=text, msd={"logit_cap": "config"}))


def test_angles_stay_exact_in_16_bit(pair):
    draft = load_draft(pair.own, dtype=torch.bfloat16)
    assert draft.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in draft.model.rotary_emb.buffers()} == {torch.float32}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ({"hidden_size": 48}, "hidden size 32 in the draft, 48 in the base"),
        (
            {"head_dim": 16},
            r"key heads and their size in sliding_attention \(2, 8\) in the draft, \(2, 16\) in the base",
        ),
        ({"global_head_dim": 8}, r"key heads and their size in full_attention \(2, 16\) in the draft"),
    ],
    ids=str,
)
def test_the_assistant_of_another_base_is_refused(text, what, tmp_path):
    own = make_assistant(make_gemma4(tmp_path / "base"), tmp_path / "draft")
    target, draft = load_target(make_gemma4(tmp_path / "other", **text)), load_draft(own)
    with pytest.raises(UserError, match=what):
        MSDModel(target, draft)
    assert [check.state.name for check in check_pair(target, draft)] == ["PROBLEM"]


def test_what_it_cannot_do_is_refused(pair, tmp_path):
    with pytest.raises(UserError, match="Gemma 4 assistant heads are not compiled"):
        MSDModel(pair.target, pair.draft, compile=True)
    with pytest.raises(UserError, match="Gemma 4 assistant heads are not exported"):
        portable(pair.draft, pair.own)
    with pytest.raises(UserError, match="'gemma5_assistant' heads are not supported"):
        kind_of({"model_type": "gemma5_assistant"}, ["pre_projection.weight"], "config.json")
    with pytest.raises(UserError, match=r"text model gemma4.* in the draft, gemma3_text in the base"):
        MSDModel(load_target(make_gemma3(tmp_path / "gemma3")), pair.draft)


def test_the_doctor_prints_its_conventions(pair):
    draft, found = check_draft(str(pair.own), hub=False)
    assert draft.pre_projection.weight.is_meta
    wanted = "position of all drafted tokens: next; window: inclusive (25 rows); logit cap: none"
    assert any(wanted in check.found for check in found)
    (fits,) = check_pair(pair.target, draft)
    assert fits.state.name == "OK" and "keys and values of layers" in fits.found

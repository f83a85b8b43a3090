"""ViSpec heads: parity with the published implementation, and the same answers as the target alone."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from repository import FULL_PARITY
from safetensors.torch import load_file
from tiny_families import make_qwen3_vl
from tiny_llava import make_llava_hf
from tiny_questions import QUESTIONS, prepared
from tiny_stock import make_qwen
from tiny_vispec import make_vispec
from torch._dynamo.utils import counters

from eagle import MSDModel, TreeConfig
from eagle.decode.drafter import Drafter
from eagle.decode.tree import leaf_paths, select_nodes
from eagle.doctor.models import check_draft
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from llava import UserError

ROOT = FULL_PARITY / "drafts"
CASES = ("text", "one_image", "two_images")
CHAIN = TreeConfig(depth=4, top_k=1, total_tokens=6)
needs_fixtures = pytest.mark.skipif(
    not ROOT.is_dir() or Version(transformers.__version__) < Version("5.19"),
    reason="the larger set of fixtures, which are checkpoints of transformers 5.19, is not here",
)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def published():
    target = load_target(ROOT / "llava" / "tiny-llava-1.5-hf", dtype=torch.float32)
    return MSDModel(target, load_draft(ROOT / "llava" / "vispec", dtype=torch.float32), CHAIN)


@pytest.fixture(params=CASES)
def case(request, published):
    prompts = json.loads((ROOT / "llava" / "prompts.json").read_text())
    (prompt,) = [prompt for prompt in prompts if prompt["name"] == request.param]
    cases = ROOT / "llava" / "cases"
    return SimpleNamespace(
        inputs=published.target.prepare(prompt["text"], [ROOT / image for image in prompt["images"]]),
        values=load_file(cases / f"{request.param}.safetensors"),
        facts=json.loads((cases / f"{request.param}.json").read_text()),
    )


def started(model, case, tree, rows) -> Drafter:
    prefill = model.target.prefill(case.inputs)
    drafter = Drafter(model.draft, model.target.head, prefill.hidden.shape[1] + 80, tree)
    hook = model.draft.layers[0].register_forward_hook(lambda module, given, out: rows.append((given[0], out)))
    drafter.start(0, prefill, case.inputs["input_ids"], case.values["first_token"])
    hook.remove()
    return drafter


@needs_fixtures
@torch.inference_mode()
def test_rows_and_chain(published, case):
    rows: list = []
    drafter = started(published, case, CHAIN, rows)
    close(rows[0][0], case.values["vispec.layer_input"])
    close(rows[0][1], case.values["vispec.layer_output"][:, -1:])
    close(drafter._context, case.values["vispec.global_feature"])
    close(published.target.head(rows[0][1])[:, 0], case.values["vispec.logits_last"])
    chain = drafter.expand(CHAIN).of(0)
    assert chain.tokens.tolist() == case.values["vispec.chain_ids"].tolist()
    close(chain.scores.diff(prepend=torch.zeros(1)), case.values["vispec.chain_logprobs"])


@needs_fixtures
@torch.inference_mode()
def test_first_tree(published, case):
    tree, values = TreeConfig(depth=4, top_k=6, total_tokens=24), case.values
    drafter = started(published, case, tree, [])
    found = select_nodes(drafter.expand(tree).of(0), values["first_token"], tree.total_tokens)
    assert torch.equal(found.tokens, values["vispec.tree24.draft_tokens"][0])
    assert torch.equal(found.depths, values["vispec.tree24.tree_position_ids"])
    assert sorted(leaf_paths(found).tolist()) == sorted(values["vispec.tree24.retrieve_indices"].tolist())


@needs_fixtures
def test_acceptance(published, case):
    output = published.generate(**case.inputs, temperature=0.0, max_new_tokens=48)
    assert output.tokens[0] == case.facts["generate_ids"]
    complete = output.stats.accept_lengths[:-1]  # the last tree is no deeper than the tokens still wanted
    assert complete == case.facts["variants"]["vispec"]["accept_lengths_chain5"][: len(complete)]


@needs_fixtures
@torch.inference_mode()
def test_image_ids_as_text(published, case):
    """What the published code does for LLaVA-1.5."""
    if "vispec_as_released.chain_ids" not in case.values:
        pytest.skip("no pictures")
    own = published.draft.config
    published.draft.config = replace(own, image_rows="token")
    try:
        chain = started(published, case, CHAIN, []).expand(CHAIN).of(0)
    finally:
        published.draft.config = own
    assert chain.tokens.tolist() == case.values["vispec_as_released.chain_ids"].tolist()
    close(chain.scores.diff(prepend=torch.zeros(1)), case.values["vispec_as_released.chain_logprobs"])


BASES = {
    "qwen3_vl": make_qwen3_vl,
    "qwen2_5_vl": lambda folder: make_qwen(folder, version="2.5"),
    "llava": make_llava_hf,
}


@pytest.fixture(scope="module", params=BASES)
def target(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load_target(BASES[request.param](folder), dtype=torch.float32)


def test_rows_cannot_be_chosen(target, tmp_path):
    draft = load_draft(make_vispec(tmp_path, target), dtype=torch.float32)
    with pytest.raises(UserError, match="draft image tokens 4: ViSpec heads"):
        MSDModel(target, draft, draft_image_tokens=4)


@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"queries": 1}, {"msd": {"image_rows": "token"}}))],
    ids=str,
)
def test_answers_equal_generate(target, tmp_path, changes):
    """Trees and chains, alone and as a batch."""
    draft = load_draft(make_vispec(tmp_path, target, **changes), dtype=torch.float32)
    model, expected = MSDModel(target, draft, TreeConfig(3, 4, 16)), []
    for question in QUESTIONS:
        inputs = prepared(target, [question])
        inputs |= target.complete_inputs(inputs["input_ids"], inputs)
        output = target.model.generate(**inputs, do_sample=False, max_new_tokens=16)
        expected.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    for tree in (TreeConfig(3, 4, 16), CHAIN):
        alone = model.generate(**prepared(target, QUESTIONS[:1]), temperature=0.0, max_new_tokens=16, tree=tree)
        assert alone.tokens == expected[:1]
    assert model.generate(**prepared(target, QUESTIONS), temperature=0.0, max_new_tokens=16).tokens == expected


@pytest.mark.parametrize("plainly", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_decoding_has_the_same_cycles(target, tmp_path, monkeypatch, plainly):
    """``plainly``: with the compiled parts' padding and caches, but without compiling them."""
    draft, tree = load_draft(make_vispec(tmp_path, target), dtype=torch.float32), TreeConfig(3, 4, 16)
    torch._dynamo.reset()
    if plainly:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, compiled = MSDModel(target, draft, tree), MSDModel(target, draft, tree, compile="eager")
    compiled.warm_up(progress=False, batch_sizes=[1, len(QUESTIONS)])
    before = counters["stats"]["unique_graphs"]
    for question in QUESTIONS:
        inputs = prepared(target, [question])
        plain, found = (each.generate(**inputs, temperature=0.0, max_new_tokens=16) for each in (model, compiled))
        assert found.tokens == plain.tokens and found.stats.accept_lengths == plain.stats.accept_lengths
    batch = {**prepared(target, QUESTIONS), "temperature": 0.0, "max_new_tokens": 16}
    plain, found = (each.generate(**batch) for each in (model, compiled))
    assert found.tokens == plain.tokens
    penalty = {**batch, "repetition_penalty": 1.2}  # the parts, not whole cycles
    assert compiled.generate(**penalty).tokens == model.generate(**penalty).tokens
    assert counters["stats"]["unique_graphs"] == before


@torch.inference_mode()
def test_a_batch_drafts_what_each_sequence_drafts_alone(target, tmp_path):
    """Each sequence has its own global vector."""
    draft = load_draft(make_vispec(tmp_path, target), dtype=torch.float32)
    MSDModel(target, draft)
    tree, alone = TreeConfig(2, 2, 6), []
    batch = Drafter(draft, target.head, 200, tree, len(QUESTIONS))
    for row, question in enumerate(QUESTIONS):
        inputs = prepared(target, [question])
        prefill, first = target.prefill(inputs), torch.tensor([7])
        single = Drafter(draft, target.head, 200, tree)
        for drafter, place in ((single, 0), (batch, row)):
            drafter.start(place, prefill, inputs["input_ids"], first)
        alone.append(single.expand(tree).of(0))
    together = batch.expand(tree)
    for row, found in enumerate(alone):
        assert torch.equal(together.of(row).tokens, found.tokens)
        close(together.of(row).scores, found.scores)


def test_refusals(tmp_path, target):
    with pytest.raises(UserError, match=r"missing img_fc.bias"):
        load_draft(make_vispec(tmp_path / "a", target, drop=("img_fc.bias",)))
    with pytest.raises(UserError, match=r"unknown key 'positions'"):
        load_draft(make_vispec(tmp_path / "b", target, msd={"positions": "plain"}))


def test_the_doctor_prints_its_conventions(tmp_path, target):
    found = [check.found for check in check_draft(str(make_vispec(tmp_path, target)), hub=False)[1]]
    assert any("ViSpec: " in text and "2 for each picture and a global vector" in text for text in found)

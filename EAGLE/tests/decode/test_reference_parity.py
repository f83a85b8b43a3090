"""Parity with an independent implementation: hidden states, draft inputs and outputs, trees, tokens, acceptance.

The reference values are those of tests/fixtures/parity, and a larger set if it is there (see `parity_dir`).
"""

import json

import pytest
import torch
from parity_fixture import BASES, CASES, reduced_head
from safetensors.torch import load_file

from eagle import MSDModel, TreeConfig
from eagle.decode.drafter import Drafter
from eagle.decode.tree import leaf_paths, select_nodes

TOLERANCE = 1e-4  # what the reference's own README calls comfortable in float32


@pytest.fixture(scope="module", params=BASES)
def family(request, parity_dir):
    folder = parity_dir / request.param
    model = MSDModel.from_pretrained(parity_dir / BASES[request.param], folder / "draft", dtype=torch.float32)
    model.target.head = reduced_head(folder, model.target.head)
    return model, parity_dir, folder


@pytest.fixture(params=CASES)
def case(request, family):
    model, root, folder = family
    prompt = prompt_named(request.param, folder)
    images = [root / prompt["image"]] if prompt["image"] else []
    values = load_file(folder / "cases" / f"{request.param}.safetensors")
    facts = json.loads((folder / "cases" / f"{request.param}.json").read_text())
    inputs = model.target.prepare(prompt["text"], images)
    if "pixel_values" in values:  # the reference resized with PIL; Qwen's stock processor resizes with torchvision
        inputs["pixel_values"] = values["pixel_values"]
    return model, inputs, values, facts


def prompt_named(name, folder):
    prompts = json.loads((folder / "prompts.json").read_text())
    found = next((prompt for prompt in prompts if prompt["name"] == name), None)
    if found is None:
        pytest.skip(f"case {name} is in the larger set only")
    return found


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_prefill_and_draft(case):
    model, inputs, values, facts = case
    target, kept = model.target, values.get("rows", slice(None))
    ids = values.get("input_ids_expanded", values["input_ids"])
    prefill = target.prefill(inputs)
    assert prefill.image_mask.sum() == facts["image_tokens"]
    if "base_position_ids" in values:
        positions, following = target.prompt_positions(ids, inputs)
        assert torch.equal(positions, values["base_position_ids"])
        assert following.item() == ids.shape[1] + values["rope_delta"].item()
    close(prefill.embeds[:, kept], values["inputs_embeds"])
    close(prefill.hidden[:, kept], values["base_hidden"])
    top = target.head(prefill.hidden[:, -1]).topk(20)
    close(top.values, values["base_logits_topk_values"])
    assert torch.equal(top.indices, values["base_logits_topk_ids"])

    rows = []
    drafter = Drafter(model.draft, target.head, ids.shape[1] + 80, TreeConfig())
    model.draft.layers[0].register_forward_hook(lambda module, given, out: rows.append((given[0], out)))
    drafter.start(0, prefill, inputs["input_ids"], values["sample_token"][0])
    close(rows[0][0][:, kept], values["draft_fused"])
    close(rows[0][1], values["draft_hidden"][:, -1:])  # the others are not computed, only their keys and values
    positions = prefill.positions
    if model.draft.config.options.positions == "plain":
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
    close(model.draft(rows[0][0], positions)[:, kept], values["draft_hidden"])
    top = target.head(rows[0][1][:, -1]).log_softmax(-1).topk(20)
    close(top.values, values["draft_logprobs_topk_values"])
    assert torch.equal(top.indices, values["draft_logprobs_topk_ids"])


@pytest.mark.parametrize("name", ["tree60", "tree24"])
@torch.inference_mode()
def test_first_tree(case, name):
    model, inputs, values, facts = case
    bounds = tree_of(facts, name)
    prefill = model.target.prefill(inputs)
    drafter = Drafter(model.draft, model.target.head, prefill.hidden.shape[1] + 80, bounds)
    drafter.start(0, prefill, inputs["input_ids"], values["sample_token"][0])
    tree = select_nodes(drafter.expand(bounds).of(0), values["sample_token"][0], bounds.total_tokens)
    assert torch.equal(tree.tokens, values[f"{name}.draft_tokens"][0])
    assert torch.equal(tree.parents, values[f"{name}.parents"])
    assert torch.equal(tree.depths, values[f"{name}.tree_position_ids"])
    assert torch.equal(tree.mask, values[f"{name}.tree_mask"][0, 0])
    assert sorted(leaf_paths(tree).tolist()) == sorted(values[f"{name}.retrieve_indices"].tolist())


@pytest.mark.parametrize("name", ["tree60", "tree24"])
def test_greedy_tokens_and_acceptance(case, name):
    model, inputs, _, facts = case
    new, stats = decode(model, inputs, tree_of(facts, name))
    assert new == facts["hf_generate_ids"]
    expected = facts["trees"][name]["accept_lengths"]  # in the small set of the first cycles of one case, else empty
    complete = stats.accept_lengths[:-1]  # the last tree is no deeper than the tokens still wanted
    assert complete[: len(expected)] == expected[: len(complete)]


@pytest.mark.parametrize("name", ["tree60", "tree24"])
def test_stops_at_an_end_token_inside_an_accepted_run(case, name):
    model, inputs, _, facts = case
    stop = facts["trees"][name]["stop_test"]
    new, _ = decode(model, inputs, tree_of(facts, name), eos_token_id=stop["eos_token_id"])
    assert new == stop["output_ids"]


def test_a_text_prompt_after_a_picture_keeps_plain_positions(family):
    """Qwen2-VL's stock class remembers the last picture's position offset; it must not leak into a text prompt."""
    model, root, folder = family
    for name in ("image_a", "text"):
        prompt = prompt_named(name, folder)
        facts = json.loads((folder / "cases" / f"{name}.json").read_text())
        inputs = model.target.prepare(prompt["text"], [root / prompt["image"]] if prompt["image"] else [])
        new, _ = decode(model, inputs, tree_of(facts, "tree24"))
        assert new == facts["hf_generate_ids"]


def tree_of(facts: dict, name: str) -> TreeConfig:
    settings = facts["trees"][name]
    return TreeConfig(settings["depth"], settings["top_k"], settings["total_token"])


def decode(model, inputs, tree, **settings):
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=64, tree=tree, **settings)
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), output.stats

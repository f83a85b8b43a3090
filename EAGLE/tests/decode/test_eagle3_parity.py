"""EAGLE-3 heads give what published implementations give for them: features, hidden states, logits, chains, trees.

The reference values are in the larger set of fixtures (see `repository.FULL_PARITY`), which the tests need.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from repository import FULL_PARITY
from safetensors.torch import load_file

from eagle import MSDModel, TreeConfig
from eagle.decode.drafter import Drafter
from eagle.decode.tree import leaf_paths, select_nodes
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target

ROOT = FULL_PARITY / "drafts"
TOLERANCE = 1e-4
BASES = {"qwen3vl": "tiny-qwen3-vl", "llava": "tiny-llava-1.5-hf"}
CASES = ("text", "one_image", "two_images")
SAME = {"qwen3vl": ("eagle3_specforge", "eagle3_speculators"), "llava": ("eagle3_safeailab", "eagle3_speculators")}
OTHERS = ("eagle3_speculators_31", "eagle3_speculators_qwen3")
VARIANTS = ("plain.token", "plain.feature", "mrope.token", "mrope.feature", "temporal.token")
CHAIN = TreeConfig(depth=4, top_k=1, total_tokens=6)
pytestmark = pytest.mark.skipif(
    not ROOT.is_dir() or Version(transformers.__version__) < Version("5.19"),
    reason="the larger set of fixtures, which are checkpoints of transformers 5.19, is not here",
)


@pytest.fixture(scope="module", params=BASES)
def family(request):
    target = load_target(ROOT / request.param / BASES[request.param], dtype=torch.float32)
    names = (*SAME[request.param], *(OTHERS if request.param == "qwen3vl" else ()))
    models = {
        name: MSDModel(target, load_draft(ROOT / request.param / name, dtype=torch.float32), CHAIN) for name in names
    }
    return SimpleNamespace(name=request.param, target=target, models=models, folder=ROOT / request.param)


@pytest.fixture(params=CASES)
def case(request, family):
    prompts = json.loads((family.folder / "prompts.json").read_text())
    (prompt,) = [prompt for prompt in prompts if prompt["name"] == request.param]
    cases = family.folder / "cases"
    return SimpleNamespace(
        inputs=family.target.prepare(prompt["text"], [ROOT / image for image in prompt["images"]]),
        values=load_file(cases / f"{request.param}.safetensors"),
        facts=json.loads((cases / f"{request.param}.json").read_text()),
    )


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def started(model: MSDModel, case: SimpleNamespace, tree: TreeConfig, rows: list) -> Drafter:
    """A drafter that has read the prompt; ``rows`` gets the rows and outputs of the first layer."""
    draft, target = model.draft, model.target
    prefill = target.prefill(case.inputs, draft.target_layers)
    drafter = Drafter(draft, target.head, prefill.hidden.shape[1] + 80, tree)
    hook = draft.layers[0].register_forward_hook(lambda module, given, out: rows.append((given[0], out)))
    drafter.start(0, prefill, case.inputs["input_ids"], case.values["first_token"])
    hook.remove()
    return drafter


def as_variant(model: MSDModel, variant: str) -> MSDModel:
    """The model with a head of other positions and image rows."""
    positions, rows = variant.split(".")
    own = model.draft.config
    model.draft.config = replace(own, positions=positions, image_rows=rows)
    return model


@torch.inference_mode()
def check(model: MSDModel, case: SimpleNamespace, name: str, fused: str) -> None:
    """Compares the prompt's rows, the chain and its acceptance with the reference values called ``name``."""
    draft, facts, values = model.draft, case.facts["variants"][name], case.values
    rows: list = []
    drafter = started(model, case, CHAIN, rows)
    close(rows[0][0][..., draft.config.hidden_size :], values[fused])
    positions = model.target.prompt_positions(case.inputs["input_ids"], case.inputs)[0]
    if draft.config.positions != "mrope":
        plain = torch.arange(positions.shape[-1]).unsqueeze(0)
        positions = plain if draft.config.positions == "plain" else positions[0]
    rope = draft.rotary(positions, torch.float32)
    hidden = draft.layers[0](rows[0][0], rope, None, True, None)  # all rows, without a cache
    close(hidden, values[f"{name}.draft_hidden"])
    close(hidden[:, -1:], rows[0][1])
    close(torch.nn.functional.linear(draft.norm(hidden), draft.lm_head.weight), values[f"{name}.draft_logits"])
    found: list = []
    hook = draft.layers[0].register_forward_hook(lambda module, given, out: found.append(out))
    chain = drafter.expand(CHAIN).of(0)
    hook.remove()
    assert chain.tokens.tolist() == facts["chain_ids"] == values[f"{name}.chain_ids"].tolist()
    steps = chain.scores.diff(prepend=torch.zeros(1))
    close(steps, values[f"{name}.chain_logprobs"])
    close(torch.cat([out[0] for out in found]), values[f"{name}.chain_hidden"])


@torch.inference_mode()
def test_features_are_what_the_layers_read(family, case):
    (model, *_) = family.models.values()
    prefill = family.target.prefill(case.inputs, model.draft.target_layers)
    close(prefill.features, case.values["base_aux_hidden"])
    close(prefill.hidden, case.values["base_hidden"])
    close(prefill.embeds, case.values["base_inputs_embeds"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_two_layouts_of_the_same_weights(family, case, variant):
    if variant not in case.facts["variants"]:
        pytest.skip("no such value")
    for name in SAME[family.name]:
        model = family.models[name]
        own = model.draft.config
        try:
            check(as_variant(model, variant), case, variant, "draft_fused")
            if "accept_lengths_chain5" in case.facts["variants"][variant]:
                output = model.generate(**case.inputs, temperature=0.0, max_new_tokens=48)
                assert output.tokens[0] == case.facts["generate_ids"]
                expected = case.facts["variants"][variant]["accept_lengths_chain5"]
                # the last tree is no deeper than the tokens still wanted; the reference counts 48 after the first one
                complete = output.stats.accept_lengths[:-1]
                assert complete == expected[: len(complete)] and sum(complete) + len(complete) > 40
        finally:
            model.draft.config = own


def test_own_conventions_by_layout(family):
    found = {name: model.draft.config for name, model in family.models.items()}
    layers = {model.draft.target_layers for model in family.models.values()}
    assert layers == {(2, 3, 5) if family.name == "qwen3vl" else (1, 3, 5)}
    for name in SAME[family.name]:
        assert found[name].image_rows == "token"
        assert found[name].positions == ("mrope" if family.name == "qwen3vl" else "plain")
    for name in OTHERS if family.name == "qwen3vl" else ():
        assert found[name].positions == "plain" and found[name].norm_before_residual


@pytest.mark.parametrize("name", OTHERS)
def test_norms_of_speculators(family, case, name):
    if name not in family.models or name not in case.facts["variants"]:
        pytest.skip("no such value")
    model = family.models[name]
    if model.draft.config.feedback == "before":
        check(model, case, name, f"{name}.draft_fused")
    else:  # the reference's hidden states are those before the norm
        check_normed(model, case, name)
    output = model.generate(**case.inputs, temperature=0.0, max_new_tokens=48)
    assert output.tokens[0] == case.facts["generate_ids"]


@torch.inference_mode()
def check_normed(model: MSDModel, case: SimpleNamespace, name: str) -> None:
    rows: list = []
    drafter = started(model, case, CHAIN, rows)
    close(rows[0][0][..., model.draft.config.hidden_size :], case.values[f"{name}.draft_fused"])
    close(rows[0][1], case.values[f"{name}.draft_hidden"][:, -1:])
    chain = drafter.expand(CHAIN).of(0)
    assert chain.tokens.tolist() == case.values[f"{name}.chain_ids"].tolist()
    close(chain.scores.diff(prepend=torch.zeros(1)), case.values[f"{name}.chain_logprobs"])


@torch.inference_mode()
def test_first_tree(family, case):
    tree = TreeConfig(depth=4, top_k=6, total_tokens=24)
    values, prefix = case.values, "plain.token.tree24"
    for name in SAME[family.name]:
        model = family.models[name]
        own = model.draft.config
        try:
            drafter = started(as_variant(model, "plain.token"), case, tree, [])
        finally:
            model.draft.config = own
        found = select_nodes(drafter.expand(tree).of(0), values["first_token"], tree.total_tokens)
        assert torch.equal(found.tokens, values[f"{prefix}.draft_tokens"][0])
        assert torch.equal(found.depths, values[f"{prefix}.tree_position_ids"])
        assert torch.equal(found.mask.float(), values[f"{prefix}.tree_mask"][0, 0].float())
        assert sorted(leaf_paths(found).tolist()) == sorted(values[f"{prefix}.retrieve_indices"].tolist())


def test_the_fixtures_have_all_heads(family):
    """A head that is not tested here would go unseen."""
    assert {path.name for path in Path(family.folder).glob("eagle3_*")} == set(family.models)

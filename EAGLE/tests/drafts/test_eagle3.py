"""Layouts of EAGLE-3 heads: kinds, strict loading, conventions and their options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_assistant import make_assistant
from tiny_draft import make_draft
from tiny_eagle3 import make_eagle3
from tiny_families import make_gemma4, make_qwen3_vl
from tiny_vispec import make_vispec

from eagle.doctor.models import check_base, check_draft, check_pair
from eagle.drafts.checkpoint import load_draft, load_msd_draft
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import Eagle3Config
from eagle.drafts.msd import DraftModel
from eagle.families import load_target
from eagle.publish import write_release
from llava import UserError

LAYER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100}
SECTION = {"mrope_section": [1, 1, 2]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_qwen3_vl(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def target(base):
    return load_target(base, dtype=torch.float32)


def test_kinds_are_told_apart(tmp_path, target):
    assert isinstance(load_draft(make_draft(tmp_path / "msd", target)), DraftModel)
    for layout in ("flat", "speculators"):
        assert isinstance(load_draft(make_eagle3(tmp_path / layout, target, layout)), Eagle3Draft)


def test_two_layouts_of_the_same_weights_give_equal_outputs(tmp_path, target):
    flat = load_draft(make_eagle3(tmp_path / "flat", target))
    other = load_draft(make_eagle3(tmp_path / "other", target, "speculators"))
    x = torch.randn(1, 7, 64)
    outputs = [draft(x, torch.arange(7)[None]) for draft in (flat, other)]
    assert torch.equal(*outputs)
    pairs = zip((flat, other), outputs, strict=True)
    assert torch.equal(*(draft.likely_next(out, 5, torch.nn.Identity())[0] for draft, out in pairs))
    assert flat.config.target_layers == other.config.target_layers == (0, 1, 3)


@torch.no_grad()
def test_with_both_kinds_of_norms_the_one_over_all_streams_comes_first(tmp_path, target):
    shapes = {"input_norm.weight": (96,), **{f"fc_norm.{index}.weight": (32,) for index in range(3)}}
    draft = load_draft(make_eagle3(tmp_path, target, norm_before_fc=True, fc_norm=True, shapes=shapes), torch.float32)
    whole, each = torch.rand(96) + 0.5, torch.rand(3, 32) + 0.5
    draft.input_norm.weight.copy_(whole)
    for norm, weight in zip(draft.fc_norm, each, strict=True):
        norm.weight.copy_(weight)
    streams = torch.randn(1, 5, 96)

    def normed(x):
        return x / (x.square().mean(dim=-1, keepdim=True) + draft.config.rms_norm_eps).sqrt()

    expected = normed((normed(streams) * whole).view(1, 5, 3, 32)) * each
    torch.testing.assert_close(draft.condense(streams), draft.fc(expected.flatten(2)))


@pytest.mark.parametrize("layout", ["flat", "speculators"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(name) for name in list(t) if "hidden_norm" in name], "missing layers.0.hidden_norm.weight"),
        (lambda t: t.pop("norm.weight"), "missing norm.weight"),
        (lambda t: t.update({"other.weight": torch.ones(2)}), "unexpected other.weight"),
        (lambda t: t.update({"fc_norm.0.weight": torch.ones(32)}), "unexpected fc_norm.0.weight"),
        (lambda t: t.update({"norm.weight": torch.ones(31)}), r"norm.weight is \[31\], config.json says \[32\]"),
        (lambda t: t.update({"norm.weight": torch.full((32,), torch.nan)}), "NaN or infinite values in norm.weight"),
        (lambda t: t.pop("d2t"), "missing d2t"),
        (lambda t: t.update({"d2t": t["d2t"] * 3}), "d2t does not lead to"),
        (lambda t: t.update({"d2t": torch.zeros_like(t["d2t"])}), "t2d does not have the ids"),
        (lambda t: t.update({"mask_hidden": torch.ones(1, 1, 96)}), "P-EAGLE heads are not supported"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(tmp_path, target, layout, change, message):
    folder = make_eagle3(tmp_path, target, layout)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as raised:
        load_draft(folder)
    assert "\n" not in str(raised.value)


def config(layout: str = "flat", **changes) -> Eagle3Config:
    if layout == "flat":
        return Eagle3Config.from_dict({**LAYER, **changes}, "config.json")
    layer = {**LAYER, **changes.pop("layer", {})}
    whole = {"speculators_model_type": "eagle3", "transformer_layer_config": layer, **changes}
    return Eagle3Config.from_dict(whole, "config.json")


IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (config(eagle_config={IDS: [1, 2, 4]}).target_layers, (2, 3, 5)),
        (config(aux_hidden_states_layer_ids=[1, 2, 4]).target_layers, (2, 3, 5)),
        (config(**{IDS: [1, 2, 4]}).target_layers, (1, 2, 4)),
        (config(**{IDS: [1, 2, 4]}, msd={"layer_ids": "output"}).target_layers, (2, 3, 5)),
        (config("speculators", **{IDS: [4, 1, 2]}).target_layers, (1, 2, 4)),
        (config("speculators", **{IDS: None}).layers_of(36), (2, 18, 33)),
        (config().positions, "plain"),
        (config(rope_scaling=SECTION).positions, "mrope"),
        (config(rope_scaling=SECTION).mrope_interleaved, False),
        (config(rope_scaling=SECTION, architectures=["Eagle3LlamaForCausalLM"]).mrope_interleaved, True),
        (config(rope_scaling=SECTION, msd={"mrope": "interleaved"}).mrope_interleaved, True),
        (config("speculators", layer={"rope_parameters": SECTION}).positions, "plain"),
        (config("speculators", layer={"rope_parameters": SECTION}, msd={"positions": "mrope"}).positions, "mrope"),
        (config(rope_theta=1e6).rope_theta, 1e6),
        (config(rope_theta=1e6, architectures=["Eagle3LlamaForCausalLM"]).rope_theta, 1e4),
        (config(rope_parameters={"rope_theta": 5e6}).rope_theta, 5e6),
        (config("speculators", norm_output=True).feedback, "after"),
        (config(norm_output=True).feedback, "before"),
        (config(norm_output=False).head_norm, False),
        (config("speculators", norm_output=False).head_norm, True),
        (config("speculators", norm_before_residual=True).norm_before_residual, True),
        (config(norm_before_residual=True, msd={"norm_before_residual": False}).norm_before_residual, False),
        (config(sliding_window=32, use_sliding_window=False).window, None),
        (config("speculators", layer={"layer_types": ["sliding_attention"], "sliding_window": 9}).window, 9),
        (config().image_rows, "token"),
        (config().image_tokens, None),
        (config("speculators", msd={"image_tokens": 0}).image_tokens, 0),
        (config(msd={"image_tokens": 4}).to_dict()["msd"]["image_tokens"], 4),
        ("image_tokens" in config().to_dict()["msd"], False),
    ],
)  # fmt: skip
def test_conventions_by_layout(found, expected):
    assert found == expected


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("flat", {"msd": {"positionz": "plain"}}, "unknown key 'positionz'.*did you mean 'positions'"),
        ("flat", {"msd": {"image_rows": "both"}}, "image_rows='both'"),
        ("flat", {"msd": {"positions": "mrope"}}, r"with mrope_section \[\] for heads of"),
        ("flat", {"rope_scaling": {"mrope_section": [1, 1, 9]}}, r"with mrope_section \[1, 1, 9\] for heads of"),
        ("flat", {"msd": {"image_tokens": -1}}, "image_tokens=-1"),
        ("flat", {"msd": {"image_tokens": "all"}}, "image_tokens='all'"),
        ("flat", {"msd": {"image_token": 4}}, "unknown key 'image_token'.*did you mean 'image_tokens'"),
        ("flat", {"rope_scaling": {"rope_type": "yarn"}}, "rotary positions of type 'yarn'"),
        ("speculators", {"layer": {"rope_parameters": {"mrope_sections": [2, 1, 1]}}}, "did you mean 'mrope_section'"),
        ("flat", {"MSD": {}}, "unknown key 'MSD'.*did you mean 'msd'"),
        ("flat", {"draft-vocab_size": 8}, "did you mean 'draft_vocab_size'"),
        ("speculators", {"norm_befor_residual": True}, "did you mean 'norm_before_residual'"),
        ("flat", {"feedback": "after"}, "'feedback' is outside of section 'msd'"),
        ("flat", {"hidden_size": 0}, "hidden_size=0"),
        ("flat", {"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
        ("flat", {"rope_scaling": {"mrope_section": 4}}, "mrope_section=4"),
        ("flat", {"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
        ("flat", {"rope_theta": -1.0}, "rope_theta=-1.0"),
        ("flat", {"eagle_config": [1]}, "eagle_config="),
        ("flat", {"layer_types": 3}, "layer_types=3"),
        ("flat", {IDS: "2"}, "layers of the target '2'"),
        ("flat", {"msd": {"feedback": "after", "head_norm": False}}, "head_norm"),
        ("speculators", {"norm_before_fc": "yes"}, "norm_before_fc='yes'"),
        ("speculators", {"transformer_layer_config": None}, "lacks 'transformer_layer_config'"),
        ("speculators", {"layer": {"num_hidden_layers": 2, "sliding_window": 4,
                                   "layer_types": ["sliding_attention", "full_attention"]}}, "one kind"),
    ],
)  # fmt: skip
def test_wrong_configs_are_refused(layout, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        config(layout, **changes)
    assert "\n" not in str(raised.value) and "config.json" in str(raised.value)


def test_default_layers_need_seven():
    assert config().layers_of(7) == (2, 3, 4)
    with pytest.raises(UserError, match="layers 2, 3, 3 of a target of 6 layers") as raised:
        config().layers_of(6)
    assert "target_layers" in str(raised.value)


@pytest.mark.parametrize("form", ["peagle", "dflash", "eagle9"])
def test_other_kinds_of_speculators_are_refused(tmp_path, target, form):
    folder = make_eagle3(tmp_path, target, "speculators", speculators_model_type=form)
    with pytest.raises(UserError, match="heads are not supported"):
        load_draft(folder)


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_what_push_writes_is_the_head_and_its_card(tmp_path, target, layout):
    folder = make_eagle3(tmp_path / "head", target, layout, msd={"feedback": "after"})
    with pytest.raises(UserError, match="the study takes MSD drafts, not EAGLE-3 heads"):
        load_msd_draft(folder, "the study")
    out = write_release(folder, tmp_path / "out", "owner/name", base_model="owner/base")
    read, written = load_draft(folder), load_draft(out)
    assert written.config == read.config and torch.equal(written.draft_vocab, read.draft_vocab)
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in written.state_dict().items())
    card = (out / "README.md").read_text()
    assert "speculative decoding (EAGLE-3) of owner/base" in card and "- eagle-3" in card


def test_push_takes_heads_that_are_trained_here(tmp_path, target):
    folder = make_vispec(tmp_path / "vispec", target)
    out = write_release(folder, tmp_path / "out", "owner/name", base_model="owner/base")
    read, written = load_draft(folder), load_draft(out)
    assert written.config == read.config
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in written.state_dict().items())
    assert "speculative decoding (ViSpec) of owner/base" in (out / "README.md").read_text()


def test_push_refuses_heads_that_are_not_trained_here(tmp_path):
    if not hasattr(transformers, "Gemma4Config"):
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    assistant = make_assistant(make_gemma4(tmp_path / "base"), tmp_path / "assistant")
    with pytest.raises(UserError, match="msd push takes heads that are trained here, not Gemma 4"):
        write_release(assistant, tmp_path / "other", "owner/name")


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_the_doctor_says_which_conventions_it_took(tmp_path, base, target, layout):
    folder = make_eagle3(tmp_path, target, layout, msd={"positions": "temporal", "image_tokens": 5})
    contents, checks = check_draft(str(folder), hub=False)
    (found,) = [check.found for check in checks if check.topic == "draft's conventions"]
    for part in (f"{layout} layout", "inputs of layers 0, 1, 3", "positions temporal", "image rows: token, at most 5"):
        assert part in found
    bases, _ = check_base(str(base), hub=False)
    (fits,) = check_pair(bases, contents)
    assert fits.state.value == "ok" and "0, 1, 3 of 3" in fits.found


def test_the_doctor_finds_a_head_of_another_base(tmp_path, base, target):
    folder = make_eagle3(tmp_path, target, msd={"target_layers": [0, 1, 7]})
    (check,) = check_pair(check_base(str(base), hub=False)[0], check_draft(str(folder), hub=False)[0])
    assert check.state.value == "problem" and "layers 0, 1, 7 of a target of 3 layers" in check.found


def test_the_doctor_names_missing_tensors(tmp_path, target):
    folder = Path(make_eagle3(tmp_path, target))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "norm_before_fc": True}))
    (check,) = check_draft(str(folder), hub=False)[1]
    assert check.state.value == "problem" and "missing input_norm.weight" in check.found

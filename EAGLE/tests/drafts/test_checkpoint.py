"""Draft checkpoints: published layouts load strictly, broken ones give one line that names the file."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from fault_support import MakesFolder
from safetensors.torch import load_file, save_file

from eagle.decode.tree_config import TreeConfig
from eagle.doctor import State
from eagle.doctor.models import check_draft
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.config import KNOWN_KEYS, DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import FAMILIES
from llava import UserError
from llava.strict import similar_key

LLAVA = {"model_type": "llava", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
QWEN = {
    **LLAVA,
    "model_type": "qwen2_vl",
    "num_key_value_heads": 1,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")  # fmt: skip
COMMON = {"embed_tokens.weight", "fc.weight", "fc.bias", *(f"layers.0.{name}.weight" for name in LAYER)}
QWEN_ONLY = {"layers.0.input_layernorm.weight", *(f"layers.0.self_attn.{p}_proj.bias" for p in "qkv")}


def write(folder, config=LLAVA, kind="bin", change=None):
    """A draft as published: config.json of the base with extra keys, weights in one 16-bit file."""
    draft = DraftModel(DraftConfig.from_dict(config))
    tensors = {name: value.to(torch.bfloat16) for name, value in draft.state_dict().items()}
    if change:
        change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "x", "use_cache": True}))
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("config", "keys"), [(LLAVA, COMMON), (QWEN, COMMON | QWEN_ONLY)], ids=["llava", "qwen2_vl"])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_published_keys(tmp_path, config, keys, kind):
    folder = write(tmp_path, config, kind)
    draft = load_draft(folder)
    assert set(draft.state_dict()) == keys
    assert draft.dtype == torch.bfloat16
    saved = save_draft(draft, tmp_path / "again")
    assert set(load_file(saved / "model.safetensors")) == keys
    again = load_draft(saved)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in draft.state_dict().items())
    assert json.loads((saved / "config.json").read_text())["mm_vision_tower"] == "x"


def test_a_draft_that_is_not_decoupled_says_so_in_its_config_alone(tmp_path):
    draft = load_draft(write(tmp_path, {**LLAVA, "msd": {"decoupled": False}}))
    saved = save_draft(draft, tmp_path / "again")
    assert json.loads((saved / "config.json").read_text())["msd"]["decoupled"] is False
    assert set(load_file(saved / "model.safetensors")) == COMMON
    hidden, embeds, image = torch.randn(1, 2, 16), torch.randn(1, 2, 16), torch.tensor([[True, False]])
    parts = (hidden.bfloat16(), embeds.bfloat16())
    assert torch.equal(load_draft(saved).fuse(*parts, image), draft.fc(torch.cat(parts[::-1], dim=-1)))
    published = load_draft(write(tmp_path / "published"))
    assert torch.equal(published.fuse(*parts, image)[0, 0], parts[1][0, 0])
    with pytest.raises(UserError, match="decoupled='no'"):
        DraftConfig.from_dict({**LLAVA, "msd": {"decoupled": "no"}})


def test_layout_follows_the_tensors_not_the_family(tmp_path):
    """A newer draft of another family may come with or without biases."""
    draft = load_draft(write(tmp_path, {**QWEN, "model_type": "llava_next"}, change=lambda t: t.pop("fc.bias")))
    assert draft.fc.bias is None
    assert not draft.config.attention_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.0.mlp.up_proj.weight"), "missing layers.0.mlp.up_proj.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected extra"),
        (lambda t: t.update({"fc.weight": torch.zeros(16, 16)}), r"fc.weight is \[16, 16\], .* says \[16, 32\]"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_every_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_draft(write(tmp_path, change=change))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_tensor_without_floats_is_refused(tmp_path, dtype):
    folder = write(tmp_path, kind="safetensors", change=lambda t: t.update({"fc.weight": t["fc.weight"].to(dtype)}))
    with pytest.raises(UserError, match=f"fc.weight has values of {str(dtype)[6:]}: .*model.safetensors"):
        load_draft(folder)


@pytest.mark.parametrize("name", ["layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_tensor_that_a_draft_does_not_need_is_left_out(tmp_path, kind, name, caplog):
    def add(tensors):
        tensors[name] = torch.full((40, 16), torch.nan) if name == "lm_head.weight" else torch.ones(4)

    draft = load_draft(write(tmp_path / "draft", kind=kind, change=add))
    assert set(draft.state_dict()) == COMMON
    (line,) = [record.getMessage() for record in caplog.records]
    assert name in line and "left out" in line
    saved = save_draft(draft, tmp_path / "again")
    assert set(load_file(saved / "model.safetensors")) == COMMON


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' in the head: .*only default and M-RoPE"),
        ({"rope_scaling": {"rope_type": "default", "type": "dynamic"}}, "rotary positions of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of type 'yarn'"),
        ({"text_config": {"rope_scaling": {"rope_type": "llama3"}}}, "rotary positions of type 'llama3'"),
        ({"rope_scaling": {"factor": 2.0}}, "unknown key 'factor': .*section 'rope_scaling'"),
        ({"rope_scaling": {"type": "mrope", "mrope_sections": [1, 1, 2]}}, "did you mean 'mrope_section'"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "unknown key 'full_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial rotary positions"),
        ({"hidden_act": "silu", "hidden_activation": "gelu"}, "hidden_act='silu' and hidden_activation='gelu'"),
        ({"MSD": {"decoupled": False}}, "unknown key 'MSD': .*did you mean 'msd'"),
        ({"msd_": {}}, "did you mean 'msd'"), ({"Block": {"size": 4}}, "did you mean 'block'"),
        ({"rope-theta": 1e6}, "did you mean 'rope_theta'"), ({"rope_teta": 1e6}, "did you mean 'rope_theta'"),
        ({"hiden_act": "gelu"}, "did you mean 'hidden_act'"), ({"rms_norm_ep": 1e-5}, "did you mean 'rms_norm_eps'"),
        ({"decoupled": False}, "'decoupled' is outside of section 'msd'"),
        ({"positions": "mrope"}, "'positions' is outside of section 'msd'"),
        ({"msd": {"positions": "mrope"}}, r"with mrope_section \[\] for heads of 8"),
        (
            {"msd": {"positions": "mrope"}, "rope_scaling": {"mrope_section": [-4, 4, 4]}},
            r"with mrope_section \[-4, 4, 4\] for heads of 8",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_would_be_ignored_is_named(tmp_path, more, message):
    folder = write(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(UserError, match=message) as raised:
        load_draft(folder)
    assert "config.json" in str(raised.value) and "\n" not in str(raised.value)


BASES = {
    "llava": {
        "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "max_length": 4096,
        "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad", "pretraining_tp": 1, "rope_scaling": None,
        "use_mm_proj": True, "unfreeze_mm_vision_tower": False, "attention_bias": False, "mlp_bias": False,
    },
    "qwen2_5_vl": {
        "vision_config": {"depth": 32, "hidden_act": "gelu", "window_size": 112}, "sliding_window": 32768,
        "max_window_layers": 28, "use_sliding_window": False, "vision_token_id": 151654, "num_hidden_layers": 1,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
    },
    "qwen3_vl": {
        "rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "mrope_interleaved": True,
                            "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0, "factor": None},
        "deepstack_visual_indexes": [5], "moe_intermediate_size": 768, "head_dim": 8,
    },
    "gemma3": {
        "hidden_activation": "silu", "query_pre_attn_scalar": 256, "final_logit_softcapping": None,
        "sliding_window_pattern": 6, "layer_types": ["full_attention"], "rope_local_base_freq": 10000.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", BASES)
def test_keys_of_base_models_are_accepted(tmp_path, family):
    """Those that a draft does not read change nothing."""
    path = write(tmp_path) / "config.json"
    plain = DraftConfig.from_json(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **BASES[family]}))
    found = DraftConfig.from_json(path)
    read = {"rope_theta": found.rope_theta, "mrope_section": found.mrope_section}
    assert replace(found, mrope_interleaved=plain.mrope_interleaved) == replace(plain, **read)


def test_no_key_of_transformers_looks_like_one_of_ours():
    """Names of the text configs of all families, which a published draft may have."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kinds = [kind for family in FAMILIES for kind in family.model_types if kind in CONFIG_MAPPING]
    seen = 0
    for kind in kinds:
        try:
            config = CONFIG_MAPPING[kind]()
        except StrictDataclassError:  # an old transformers whose config class refuses its own defaults
            continue
        seen += 1
        for key in {*config.to_dict(), *config.get_text_config().to_dict()}:
            assert similar_key(key, KNOWN_KEYS) is None, (kind, key)
    assert seen > 5


def test_gemmas_name_of_the_activation_is_read():
    assert DraftConfig.from_dict({**LLAVA, "hidden_activation": "gelu"}).hidden_act == "gelu"
    assert DraftConfig.from_dict({**LLAVA, "hidden_act": "gelu", "hidden_activation": None}).hidden_act == "gelu"


@pytest.mark.parametrize("value", [[1], {"a": 1}, "x", -1, 0.5, None])
@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "rope_scaling", "text_config", "hidden_act", "msd"])
def test_any_value_of_a_config_is_a_line_or_a_draft(tmp_path, key, value):
    folder = write(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    found = check_draft(str(folder), hub=False)[1][0]
    try:
        load_draft(folder)
    except UserError as error:
        assert "\n" not in str(error)
        assert found.state is State.PROBLEM
    else:
        assert found.state is State.OK


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_truncated_file(tmp_path, kind):
    folder = write(tmp_path, kind=kind)
    file = folder / ("pytorch_model.bin" if kind == "bin" else "model.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=f"weight file is damaged or truncated.*{file.name}"):
        load_draft(folder)


def test_a_file_of_an_old_torch_loads(tmp_path):
    """Before torch 1.6 a .bin was no zip file, and cannot be mapped into memory."""
    folder = write(tmp_path)
    file = folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert set(load_draft(folder).state_dict()) == COMMON


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = write(tmp_path / "draft")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": MakesFolder(tmp_path / "ran")}))
    with pytest.raises(UserError, match="damaged"):
        load_draft(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "draft config not found"),
        (lambda f: (f / "pytorch_model.bin").unlink(), "no weights"),
        (lambda f: (f / "config.json").write_text("{}"), "lacks hidden_size"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_missing_or_broken_files(tmp_path, prepare, message):
    folder = write(tmp_path)
    prepare(folder)
    with pytest.raises(UserError, match=message):
        load_draft(folder)


def test_absent_folder():
    with pytest.raises(UserError, match=r"draft not found: \./nowhere"):
        load_draft("./nowhere")


def test_unknown_key_of_our_own_section_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown key 'position'.*did you mean 'positions'\?"):
        DraftConfig.from_dict({**LLAVA, "msd": {"position": "mrope"}})


def test_tree_settings_are_strict():
    with pytest.raises(UserError, match="did you mean 'total_tokens'"):
        TreeConfig.from_dict({"total_token": 60})
    with pytest.raises(UserError, match="top_k=0"):
        TreeConfig(top_k=0)


def test_16_bit_does_not_coarsen_the_rotary_angles():
    """Position 5001 and 5002 must differ in bfloat16 too."""
    draft = DraftModel(DraftConfig.from_dict({**LLAVA, "num_attention_heads": 1})).to(torch.bfloat16)
    exact = DraftModel(DraftConfig.from_dict({**LLAVA, "num_attention_heads": 1}))
    positions = torch.tensor([[5001, 5002]])
    ours, reference = (model.rotary(positions, torch.float32) for model in (draft, exact))
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("config", [LLAVA, QWEN], ids=["llava", "qwen2_vl"])
def test_joined_projections_change_nothing(config):
    torch.manual_seed(0)
    draft = DraftModel(DraftConfig.from_dict(config))
    rows, positions = torch.randn(1, 5, 16), torch.arange(5)[None]
    before, tensors = draft(rows, positions), {name: t.clone() for name, t in draft.state_dict().items()}
    draft.prepare_for_decoding()
    torch.testing.assert_close(draft(rows, positions), before)
    assert all(torch.equal(tensors[name], value) for name, value in draft.state_dict().items())
    assert set(draft.state_dict()) == set(tensors)

"""Draft checkpoints: published layouts load strictly, broken ones give one line that names the file."""

import json
import os
import pickle

import pytest
import torch
from fault_support import MakesFolder
from safetensors.torch import load_file, save_file

from eagle.decode.tree_config import TreeConfig
from eagle.doctor import State
from eagle.doctor.models import check_draft
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from llava import UserError

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

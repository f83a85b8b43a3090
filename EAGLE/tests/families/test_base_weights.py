"""Embedding and head from every layout of a base."""

import json

import pytest
import torch
from safetensors.torch import save_file

from eagle.families import family_named
from eagle.families.base_weights import load_base_tensors
from llava.errors import UserError

EMBED, HEAD, OTHER = torch.arange(12.0).view(4, 3), -torch.arange(12.0).view(4, 3), torch.zeros(2, 2)
NAMES = [
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
]


def write(folder, names, ending, sharded, head=True, config=None):
    save = save_file if ending == "safetensors" else torch.save
    stem = "model" if ending == "safetensors" else "pytorch_model"
    parts = [{names[0]: EMBED}, {"model.layers.0.x": OTHER}, {names[1]: HEAD} if head else {"y": OTHER.clone()}]
    (folder / "config.json").write_text(json.dumps(config or {}))
    if not sharded:
        save({k: v for part in parts for k, v in part.items()}, folder / f"{stem}.{ending}")
        return folder
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"{stem}-{number}.{ending}"
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("names", NAMES)
def test_every_layout(tmp_path, names, ending, sharded):
    base = load_base_tensors(write(tmp_path, names, ending, sharded))
    assert torch.equal(base.embed, EMBED) and torch.equal(base.head, HEAD)


def test_only_the_needed_shards_are_opened(tmp_path):
    write(tmp_path, NAMES[0], "bin", True)
    (tmp_path / "pytorch_model-1.bin").write_bytes(b"never read")
    base = load_base_tensors(tmp_path)
    assert torch.equal(base.embed, EMBED) and torch.equal(base.head, HEAD)


@pytest.mark.parametrize("where", ["config", "text_config"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("names", NAMES)
def test_tied_head(tmp_path, names, ending, sharded, where):
    tied = {"tie_word_embeddings": True}
    config = tied if where == "config" else {"text_config": tied}
    base = load_base_tensors(write(tmp_path, names, ending, sharded, False, config))
    assert torch.equal(base.embed, EMBED) and base.head is base.embed


@pytest.mark.parametrize("layout", ["liuhaotian", "llava_hf"])
def test_stock_classes(tmp_path, layout):
    import tiny_llava

    path = getattr(tiny_llava, f"make_{layout}")(tmp_path / "base", shards=2)
    base = load_base_tensors(path)
    assert base.embed.shape == base.head.shape and base.embed.shape[1] == tiny_llava.TinySizes().hidden


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="base model not found"):
        load_base_tensors(tmp_path / "absent")
    with pytest.raises(UserError, match="base model config not found"):
        load_base_tensors(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        load_base_tensors(tmp_path)
    write(tmp_path, NAMES[0], "safetensors", True, head=False)
    with pytest.raises(UserError, match="no lm_head"):
        load_base_tensors(tmp_path)
    write(tmp_path, NAMES[0], "safetensors", True)
    save_file({"lm_head.weight": HEAD.to(torch.int8)}, tmp_path / "model-2.safetensors")
    with pytest.raises(UserError, match="lm_head has values of int8"):
        load_base_tensors(tmp_path)
    (tmp_path / "model-0.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="damaged or truncated"):
        load_base_tensors(tmp_path)
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"weight files missing.*model-0\.safetensors"):
        load_base_tensors(tmp_path)


@pytest.mark.parametrize(
    ("kind", "tied"), [("gemma3", True), ("mistral3", True), ("llava", False), ("llava_llama", False)]
)
def test_a_config_without_a_word_on_ties_has_the_default_of_its_class(tmp_path, kind, tied):
    write(tmp_path, NAMES[0], "safetensors", False, head=False, config={"model_type": kind})
    if tied:
        assert torch.equal(load_base_tensors(tmp_path).head, EMBED)
    else:
        with pytest.raises(UserError, match="no lm_head"):
            load_base_tensors(tmp_path)


@pytest.mark.parametrize(("kind", "cap"), [("gemma4", 30.0), ("gemma3", None)])
def test_only_some_families_cap_their_logits(tmp_path, kind, cap):
    config = {"model_type": kind, "text_config": {"final_logit_softcapping": 30.0}}
    try:
        family_named(kind).target_class()
    except ImportError:
        pytest.skip(f"this transformers does not have {kind}")
    assert load_base_tensors(write(tmp_path, NAMES[0], "safetensors", False, config=config)).cap == cap

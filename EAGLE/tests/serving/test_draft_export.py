"""Drafts in vLLM's format: files, tensors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from repository import REPO
from safetensors.torch import load_file, save_file
from tiny_draft import make_draft
from tiny_llava import make_liuhaotian, make_llava_hf
from tiny_vispec import make_vispec

from eagle.cli import main
from eagle.drafts.draft_vocab import write_draft_vocab
from eagle.families import load_target
from eagle.families.base_weights import load_base_tensors
from eagle.serving.draft import ARCHITECTURE, export_draft

POCKET = REPO / "pocket"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in both layouts, with a draft of the first, and a base of other weights."""
    root = tmp_path_factory.mktemp("bases")
    base = make_liuhaotian(root / "base")
    make_draft(root / "draft", load_target(base, dtype=torch.float32))
    make_llava_hf(root / "larger")
    make_llava_hf(root / "other", seed=1)
    return root


def changed(draft: Path, folder: Path, **options: object) -> Path:
    """A copy of a draft with a section "msd"."""
    folder.mkdir()
    config = json.loads((draft / "config.json").read_text())
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}  # of half a head of 8
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": rope, "msd": options}))
    (folder / "model.safetensors").write_bytes((draft / "model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_tensors_and_sizes_are_the_drafts(name: str, tmp_path: Path) -> None:
    draft = POCKET / f"{name}-msd"
    out = export_draft(draft, tmp_path / "out", POCKET / name)
    own, written = load_file(draft / "model.safetensors"), load_file(out / "model.safetensors")
    assert written.keys() == own.keys()
    assert all(torch.equal(written[key], own[key]) for key in own)
    published, config = (json.loads((folder / "config.json").read_text()) for folder in (draft, out))
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "rms_norm_eps", "torch_dtype"):
        assert config[key] == published[key]
    assert config["architectures"] == [ARCHITECTURE] and config["model_type"] == "llama"
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": published["rope_theta"]}
    qwen = name == "qwen2vl"
    assert config["qkv_bias"] is qwen and config["attention_bias"] is False
    assert config["msd"] == {
        "family": published["model_type"], "targets": ["qwen2_vl"] if qwen else ["llava", "llava_llama"],
        "decoupled": True, "input_layernorm": qwen, "fc_bias": True,
        "draft_vocab_size": None,
    }  # fmt: skip


def test_the_embedding_gets_the_rows_that_a_larger_base_has(bases: Path, tmp_path: Path) -> None:
    base = load_base_tensors(bases / "larger").embed
    written = load_file(export_draft(bases / "draft", tmp_path / "out", bases / "larger") / "model.safetensors")
    own = load_file(bases / "draft" / "model.safetensors")["embed_tokens.weight"]
    assert len(base) > len(own)
    assert torch.equal(written["embed_tokens.weight"], torch.cat([own, base[len(own) :]]))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(base)


def test_a_trimmed_vocabulary_brings_its_ids_and_rows_of_the_head(bases: Path, tmp_path: Path) -> None:
    draft = changed(bases / "draft", tmp_path / "draft")
    ids = torch.tensor([3, 7, 40])
    write_draft_vocab(draft, ids)
    out = export_draft(draft, tmp_path / "out", bases / "base")
    written = load_file(out / "model.safetensors")
    assert written["draft_vocab"].tolist() == ids.tolist()
    assert torch.equal(written["lm_head.weight"], load_base_tensors(bases / "base").head[ids])
    assert json.loads((out / "config.json").read_text())["msd"]["draft_vocab_size"] == 3


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("image_tokens", "cannot merge picture rows"),
        ("positions", "gives a draft plain positions"),
        ("layout", "--layout is for EAGLE-3 heads"),
        ("vispec", "ViSpec heads are not exported to vLLM"),
        ("trimmed", "name the base model with --base-model"),
        ("no positions", "name the base model with --base-model"),
        ("family", "family llava in the draft, qwen2_vl in the base"),
        ("no family of vLLM", "drafts of Gemma 3 are not exported to vLLM"),
        ("no base of vLLM", "drafts of LLaVA-OneVision are not exported to vLLM"),
        ("weights", "its token embedding is not the base's"),
        ("size", "hidden size 32 in the draft, 256 in the base"),
        ("sglang", "no decoupled picture rows"),
        ("full folder", "not empty"),
        ("no draft", "--msd-model"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    case: str, words: str, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft, to, base, out = bases / "draft", "vllm", None, tmp_path / "out"
    if case == "image_tokens":
        draft = changed(draft, tmp_path / "draft", image_tokens=4)
    elif case == "positions":
        draft = changed(draft, tmp_path / "draft", positions="mrope")
    elif case == "vispec":
        draft = make_vispec(tmp_path / "draft", load_target(bases / "base", dtype=torch.float32))
    elif case == "trimmed":
        draft = changed(draft, tmp_path / "draft")
        write_draft_vocab(draft, torch.tensor([1, 2]))
    elif case == "full folder":
        out = draft
    elif case == "no family of vLLM":
        draft = changed(draft, tmp_path / "draft")
        config = json.loads((draft / "config.json").read_text())
        (draft / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    elif case == "no base of vLLM":
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text('{"model_type": "llava_onevision"}')
    bases_of = {"family": POCKET / "qwen2vl", "weights": bases / "other", "size": POCKET / "llava"}
    bases_of["no base of vLLM"] = tmp_path / "base"
    base = bases_of.get(case, bases / "larger" if case == "full folder" else None)
    arguments = ["export", "--to", "sglang" if case == "sglang" else to, "--out", str(out)]
    arguments += ["--msd-model", str(draft)] if case != "no draft" else []
    arguments += ["--layout", "flat"] if case == "layout" else []
    before = sorted(bases.rglob("*"))
    assert main([*arguments, *(["--base-model", str(base)] if base else [])]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and words in shown.err, shown.err
    assert case == "full folder" or not out.exists()
    assert sorted(bases.rglob("*")) == before


def test_the_command_says_how_the_export_is_served(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--to", "vllm", "--msd-model", str(bases / "draft"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--base-model", str(bases / "larger")]) == 0
    shown = capsys.readouterr().out
    assert f"vllm serve {bases / 'larger'} --speculative-config" in shown and '"method": "eagle"' in shown
    assert main(["export", "--base", str(bases / "base"), "--out", str(tmp_path / "base")]) == 0
    assert (tmp_path / "base" / "chat_template.jinja").is_file()


def test_a_published_bin_file_is_exported_too(bases: Path, tmp_path: Path) -> None:
    own = load_file(bases / "draft" / "model.safetensors")
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_bytes((bases / "draft" / "config.json").read_bytes())
    torch.save(own, tmp_path / "draft" / "pytorch_model.bin")
    written = load_file(export_draft(tmp_path / "draft", tmp_path / "out", bases / "base") / "model.safetensors")
    assert all(torch.equal(written[key], own[key]) for key in own)
    save_file(own, tmp_path / "same.safetensors")  # the same bytes of tensors
    assert written.keys() == load_file(tmp_path / "same.safetensors").keys()

"""EAGLE-3 heads in the layouts that servers read: equal outputs and conventions after loading, whatever they were."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_eagle3 import make_eagle3
from tiny_families import make_qwen3_vl
from tiny_stock import make_qwen

from eagle.cli import main
from eagle.decode.compatibility import check_compatible
from eagle.doctor import State
from eagle.doctor.served_eagle3 import check_served_eagle3
from eagle.doctor.serving import check_served_draft
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.families import Target, load_target

MROPE = {"rope_scaling": {"mrope_section": [1, 1, 2], "mrope_interleaved": True}}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "flat": ("flat", MROPE),
    "AngelSlim's": ("flat", {"architectures": ["Eagle3LlamaForCausalLM"], "rope_theta": 5e6}),
    "3.1": ("speculators", {"norm_output": True, "norm_before_residual": True}),
    "fc_norm, window": (
        "flat",
        {"fc_norm": True, "layer_types": ["sliding_attention"], "sliding_window": 4,
         "shapes": {f"fc_norm.{index}.weight": (32,) for index in range(3)}},
    ),
    "without lm_head": ("flat", {"drop": ("lm_head.weight",), "msd": {"feedback": "after"}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Target]:
    folder = make_qwen3_vl(tmp_path_factory.mktemp("base") / "base")
    return folder, load_target(folder, dtype=torch.float32)


def loaded(folder: Path, target: Target) -> Eagle3Draft:
    draft = load_draft(folder, dtype=torch.float32)
    assert isinstance(draft, Eagle3Draft)
    check_compatible(target, draft)
    return draft.prepare_for_decoding(target.model.get_output_embeddings())


@pytest.mark.parametrize("layout", ["flat", "speculators"])
@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_an_exported_head_gives_equal_outputs(
    base: tuple[Path, Target], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, layout: str
) -> None:
    folder, target = base
    published, changes = HEADS[kind]
    head = make_eagle3(tmp_path / "head", target, published, **changes)  # type: ignore[arg-type]
    out = tmp_path / "out"
    command = ["export", "--to", "vllm", "--msd-model", str(head), "--base-model", str(folder), "--out", str(out)]
    assert main([*command, "--layout", layout]) == 0
    assert '"method": "eagle3"' in capsys.readouterr().out
    before, after = loaded(head, target), loaded(out, target)
    assert after.config.layout == layout and after.target_layers == before.target_layers
    kept = {each.name for each in fields(before.config) if each.compare}
    kept -= {"layout", "mrope_section", "mrope_interleaved", "own_embedding", "own_head"}
    assert {name: getattr(after.config, name) for name in kept} == {name: getattr(before.config, name) for name in kept}
    features, ids = torch.randn(1, 7, 3 * target.hidden_size), torch.randint(0, 50, (1, 7))
    positions = torch.arange(7).expand(3, 1, -1) + torch.tensor([0, 2, 5])[:, None, None]
    positions = positions if before.positions == "mrope" else positions[0]
    outputs = []
    for draft in (before, after):
        hidden = draft(draft.text_rows(draft.condense(features), ids), positions)
        again = draft(draft.text_rows(hidden, ids), positions)
        outputs.append((again, *draft.likely_next(again, 4, target.model.get_output_embeddings())))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)
    wrong = [each for each in check_served_eagle3(after, target, "V1") if each.state is not State.OK]
    assert {each.topic for each in wrong} <= {"vLLM: positions", "vLLM: cached rows"}, wrong


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_merged_image_rows_are_not_exported(
    base: tuple[Path, Target], tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """Servers would read the head without a word, and with all rows."""
    folder, target = base
    head, out = make_eagle3(tmp_path / "head", target, msd={"image_tokens": 4}), tmp_path / "out"
    command = ["export", "--to", "vllm", "--msd-model", str(head), "--base-model", str(folder), "--out", str(out)]
    assert main([*command, "--layout", layout]) == 2 and not out.exists()
    assert "vLLM and SGLang cannot merge picture rows (image_tokens 4)" in capsys.readouterr().err
    check = check_served_draft(load_draft(head), str(head))
    assert check.state is State.WARNING and "cannot merge picture rows" in check.found


def test_the_layout_of_speculators_is_what_that_library_and_vllm_ask_for(
    base: tuple[Path, Target], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = base
    head = make_eagle3(tmp_path / "head", target)
    command = ["export", "--to", "vllm", "--msd-model", str(head), "--layout", "speculators"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "name it with --base-model" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--base-model", str(folder), "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert config["speculators_config"]["verifier"]["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert config["norm_before_residual"] is False and config["transformer_layer_config"]["model_type"] == "llama"
    assert torch.equal(tensors["embed_tokens.weight"], target.model.get_input_embeddings().weight)
    assert len(tensors["d2t"]) == config["draft_vocab_size"] == int(tensors["t2d"].sum())
    biased = make_eagle3(tmp_path / "biased", target, shapes={"fc.bias": (32,)})
    assert main([*command, "--msd-model", str(biased), "--base-model", str(folder), "--out", str(tmp_path / "b")]) == 2
    assert "no heads with a bias of fc" in capsys.readouterr().err


SERVED: dict[str, Any] = {"msd": {"image_rows": "feature"}}
"""What SGLang has for image rows."""


@pytest.mark.parametrize("kind", ["flat", "speculators", "without lm_head"])
@torch.no_grad()
def test_a_head_written_for_sglang_has_its_keys_and_equal_outputs(
    base: tuple[Path, Target], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, target = base
    changes: dict[str, Any] = {**MROPE, **SERVED}
    if kind == "speculators":  # with a token embedding, which is the base's
        head = make_eagle3(tmp_path / "head", target, "speculators", **SERVED, norm_output=True)
        path, config = head / "config.json", json.loads((head / "config.json").read_text())
        path.write_text(json.dumps({**config, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}))
    else:
        changes["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [-1, 0, 1]}
        drop = ("lm_head.weight",) if kind == "without lm_head" else ()
        head = make_eagle3(tmp_path / "head", target, drop=drop, **changes)
    out = tmp_path / "out"
    command = ["export", "--to", "sglang", "--msd-model", str(head), "--base-model", str(folder), "--out", str(out)]
    assert main(command) == 0
    assert f"--speculative-draft-model-path {out}" in capsys.readouterr().out
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["tie_word_embeddings"] is False
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [-1, 0, 1], "outputs of layers"
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2], "inputs of layers, which vLLM reads"
    assert ("mrope_section" in config["rope_parameters"]) == (kind != "speculators")
    assert config.get("norm_output", False) == (kind == "speculators")
    assert "lm_head.weight" in tensors and "embed_tokens.weight" not in tensors
    before, after = loaded(head, target), loaded(out, target)
    assert after.target_layers == before.target_layers == (0, 1, 2)
    assert after.config.image_rows == "feature" and after.positions == before.positions
    features, ids = torch.randn(1, 7, 3 * target.hidden_size), torch.randint(0, 50, (1, 7))
    positions = torch.arange(7).expand(3, 1, -1) if before.positions == "mrope" else torch.arange(7)[None]
    outputs = [draft(draft.text_rows(draft.condense(features), ids), positions) for draft in (before, after)]
    torch.testing.assert_close(*outputs)
    head_of = target.model.get_output_embeddings()
    for one, other in zip(*(draft.likely_next(outputs[0], 4, head_of) for draft in (before, after)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"msd": {}}, 'was trained with "token" rows'),
        ({"msd": {**SERVED["msd"], "norm_before_residual": True}}, "a head with norm_before_residual"),
        ({**SERVED, "shapes": {"fc.bias": (32,)}}, "a head with biases"),
        ({**SERVED, "layer_types": ["sliding_attention"], "sliding_window": 4}, "a head with a sliding window"),
        ({"msd": {**SERVED["msd"], "positions": "temporal"}}, 'a head with "positions": "temporal"'),
        ({**SERVED, "eagle_config": None}, "the stream behind the base's last layer (3)"),
        ({**SERVED, "flags": ["--layout", "speculators"]}, "the flat layout only"),
        ({**SERVED, "flags": []}, "name it with --base-model"),
    ],
)  # fmt: skip
def test_what_sglang_would_run_otherwise_is_refused_in_one_line(
    base: tuple[Path, Target],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    folder, target = base
    made = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 0, 1]}, **changes}
    flags = made.pop("flags", ["--base-model", str(folder)])
    if made["eagle_config"] is None:
        del made["eagle_config"]  # the last of its layers is the base's last one then
    head = make_eagle3(tmp_path / "head", target, **made)
    command = ["export", "--to", "sglang", "--msd-model", str(head), "--out", str(tmp_path / "out")]
    assert main([*command, *flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and words.replace("a head", "an EAGLE-3 head") in told, told
    assert not (tmp_path / "out").exists()


def test_bases_that_sglang_has_no_heads_for_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_qwen(tmp_path / "base")
    head = make_eagle3(tmp_path / "head", load_target(folder, dtype=torch.float32), **SERVED)
    command = ["export", "--to", "sglang", "--msd-model", str(head), "--base-model", str(folder)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "SGLang does not run EAGLE-3 heads of qwen2_vl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""`msd doctor --served-by vllm`: heads that vLLM runs as they were trained, and heads that it runs otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_eagle3 import make_eagle3
from tiny_families import make_qwen3_vl
from tiny_llava import make_llava_hf
from tiny_stock import make_qwen

from eagle.cli import main
from eagle.doctor import Check, State
from eagle.doctor.served_eagle3 import check_served_eagle3
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import IDS, Eagle3Config
from eagle.families import Target, load_target
from eagle.families.draft_config import eagle3_config_of
from eagle.train.settings import read_config

MAKERS = {"llava": make_llava_hf, "qwen3_vl": make_qwen3_vl, "qwen2_vl": make_qwen}
SECTION = {"type": "mrope", "mrope_section": [1, 1, 2], "mrope_interleaved": True}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Target]]:
    folder = tmp_path_factory.mktemp("bases")
    made = {name: make(folder / name) for name, make in MAKERS.items()}
    return {name: (path, load_target(path, device_map="meta")) for name, path in made.items()}


def head(config: dict[str, Any], base: Path) -> Eagle3Draft:
    """A head for a base, as training makes it, with other fields of ``config.json``."""
    with torch.device("meta"):
        return Eagle3Draft(Eagle3Config.from_dict({**eagle3_config_of(base).published, **config}, "config.json"))


def differences(checks: list[Check]) -> dict[str, str]:
    assert all(check.fix for check in checks if check.state is State.PROBLEM)
    return {check.topic.removeprefix("vLLM: "): check.found for check in checks if check.state is State.PROBLEM}


@pytest.mark.parametrize(
    ("family", "runner", "msd"),
    [("llava", "V1", {}), ("llava", "V2", {}), ("qwen3_vl", "V2", {"positions": "plain"})],
)
@pytest.mark.parametrize("config", [{}, {"draft_vocab_size": 50}], ids=["whole", "trimmed"])
def test_a_head_as_it_is_trained_by_default_or_with_plain_positions_agrees(
    bases: dict[str, tuple[Path, Target]], family: str, runner: str, msd: dict[str, str], config: dict[str, Any]
) -> None:
    base, target = bases[family]
    config = {**config, "msd": msd}
    checks = check_served_eagle3(head(config, base), target, runner)
    assert {check.state for check in checks} == {State.OK}, checks
    assert any("chains only" in check.found for check in checks)


TOP = [0, 1, 2]


@pytest.mark.parametrize(
    ("family", "runner", "config", "topic", "found"),
    [
        ("llava", "V1", {IDS: [0, 1]}, "layers", "2 streams, vLLM has 3"),
        ("llava", "V1", {"msd": {"target_layers": [1, 2]}, "num_aux_hidden_states": 2, IDS: TOP}, "layers", "1, 2, vL"),
        ("llava", "V1", {IDS: [0, 1], "num_aux_hidden_states": 2, "msd": {"layer_ids": "output"}},
         "layers", "layers 1, 2, vLLM has the inputs of layers 0, 1"),
        ("llava", "V1", {"eagle_config": {IDS: [-1, 0, 1]}, IDS: None}, "layers", "0, 1, 2, vLLM has .* -1, 0, 1$"),
        ("llava", "V1", {"msd": {"image_rows": "feature"}}, "image rows", "projected image features, vLLM has the"),
        ("llava", "V1", {"msd": {"image_tokens": 4}}, "image rows", "at most 4 rows of a picture, vLLM has the place"),
        ("llava", "V1", {"msd": {"norm_before_residual": True}}, "norms", "norm_before_residual true.*residual false"),
        ("llava", "V1", {"norm_output": True}, "norms", "norm_output false.*norm_output true"),
        ("llava", "V1", {"msd": {"feedback": "after"}}, "norms", "norm_output true.*norm_output false"),
        ("llava", "V1", {"norm_output": False}, "norms", "no norm before lm_head, vLLM has one"),
        ("llava", "V1", {"eagle_config": {"fc_norm": True}}, "norms", "fc_norm true.*fc_norm false"),
        ("llava", "V1", {"msd": {"rope_theta": 9e5}}, "rotary base", "trained with 900000, vLLM has 10000"),
        ("llava", "V1", {"vocab_size": 60, "draft_vocab_size": 60}, "vocabulary", "the head's vocab_size is 60"),
        ("llava", "V1", {"layer_types": ["sliding_attention"], "sliding_window": 9, "use_sliding_window": False},
         "layer", "window: None, vLLM has 9"),
        ("qwen3_vl", "V2", {}, "positions", "mrope interleaved, vLLM has plain"),
        ("qwen3_vl", "V1", {"msd": {"positions": "plain"}}, "positions", "plain, vLLM has mrope interleaved"),
        ("qwen3_vl", "V1", {"rope_scaling": None}, "positions", "plain, vLLM has temporal"),
        ("qwen3_vl", "V2", {"rope_scaling": None, "msd": {"positions": "temporal"}}, "positions", "temporal, .* plain"),
        ("qwen3_vl", "V1", {"msd": {"mrope": "sectioned"}}, "positions", "mrope sectioned, vLLM has mrope interleaved"),
        ("qwen2_vl", "V1", {}, "base model", "vLLM does not run EAGLE-3 heads of qwen2_vl"),
    ],
)  # fmt: skip
def test_each_difference_is_a_line_with_a_fix(
    bases: dict[str, tuple[Path, Target]], family: str, runner: str, config: dict[str, Any], topic: str, found: str
) -> None:
    base, target = bases[family]
    told = differences(check_served_eagle3(head(config, base), target, runner))
    cache = told.pop("cached rows", "")
    assert ("overwrite rows of the prompt" in cache) == (family != "llava" and runner == "V1")
    assert list(told) == [topic]
    assert re.search(found, told[topic]), told


def test_runners_are_told_apart_and_ids_are_compared_without_a_base(bases: dict[str, tuple[Path, Target]]) -> None:
    base, target = bases["qwen3_vl"]
    checks = check_served_eagle3(head({}, base), target, None)
    assert list(differences(checks)) == ["positions, model runner V2", "cached rows, model runner V1"]
    told = check_served_eagle3(head({"msd": {"target_layers": [0, 1, 3]}}, base), None, "V1")
    assert list(differences(told)) == ["layers", "cached rows"] and told[0].state is State.WARNING


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, {"V1": ["cached rows"], "V2": ["positions"]}),
        ("mrope", {"V1": ["cached rows"], "V2": ["positions"]}),
        ("plain", {"V1": ["positions", "cached rows"], "V2": []}),
    ],
)
def test_heads_of_a_base_with_mrope_by_the_positions_of_the_training_command(
    bases: dict[str, tuple[Path, Target]], positions: str | None, expected: dict[str, list[str]]
) -> None:
    base, target = bases["qwen3_vl"]
    config, _ = read_config("auto", str(base), "eagle3", positions)
    assert isinstance(config, Eagle3Config)
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    told = {runner: differences(check_served_eagle3(draft, target, runner)) for runner in expected}
    assert {runner: list(found) for runner, found in told.items()} == expected


def test_the_layout_of_speculators_has_defaults_of_its_own(bases: dict[str, tuple[Path, Target]]) -> None:
    base, target = bases["llava"]
    layer = {**eagle3_config_of(base).published, "model_type": "llama"}
    config = {"speculators_model_type": "eagle3", "transformer_layer_config": layer, IDS: TOP}
    with torch.device("meta"):
        draft = Eagle3Draft(Eagle3Config.from_dict({**config, "draft_vocab_size": layer["vocab_size"]}, "config.json"))
    told = differences(check_served_eagle3(draft, target, "V1"))
    assert list(told) == ["norms"] and "norm_before_residual false" in told["norms"], "vLLM takes true if it is missing"
    with torch.device("meta"):
        draft = Eagle3Draft(Eagle3Config.from_dict({**config, "norm_before_residual": False}, "config.json"))
    assert not differences(check_served_eagle3(draft, target, "V2"))


def test_the_command_fails_for_what_vllm_runs_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    base = make_qwen3_vl(tmp_path / "base")
    target = load_target(base, dtype="float32")
    made = {
        "eagle3": make_eagle3(tmp_path / "eagle3", target),
        "msd": make_draft(tmp_path / "msd", target, msd={"image_tokens": 2}),
    }
    told = {}
    for kind, folder in made.items():
        assert main(["doctor", "--base-model", str(base), "--msd-model", str(folder), "--served-by", "vllm"]) == 1
        told[kind] = capsys.readouterr().out
    assert f'write "{IDS}": [0, 1, {len(target.text_model.layers)}] at the top' in told["eagle3"]
    assert "vLLM cannot merge picture rows" in told["msd"]
    assert main(["doctor", "--served-by", "vllm"]) == 2
    assert "--served-by without a draft" in capsys.readouterr().err

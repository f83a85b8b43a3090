"""docs/porting.md: its tensors, keys, commands and snippet are those of the code."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eagle.cli import parser
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.config import DraftConfig, DraftOptions
from eagle.drafts.msd import DraftModel
from llava.errors import UserError

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "porting.md").read_text(encoding="utf-8")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_tensors_are_those_of_both_families() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|(.*)\|$", section("Layout"), re.MULTILINE)
    qwen, llava = (
        set(DraftModel(DraftConfig.from_dict({**SIZES, "model_type": t})).state_dict()) for t in ("qwen2_vl", "llava")
    )
    assert {name for name, _ in rows} == qwen
    assert {name for name, about in rows if "Qwen only" in about or "_proj.bias" in name} == qwen - llava


def test_defaults_of_the_config_are_those_of_the_code() -> None:
    config = DraftConfig.from_dict(SIZES)
    told = dict(
        re.findall(r"^\| `(\w+)`.* \| `?([^`|]+?)`? \|$", section("What is read from config.json"), re.MULTILINE)
    )
    assert float(told["rms_norm_eps"]) == config.rms_norm_eps
    assert float(told["rope_theta"]) == config.rope_theta
    assert told["hidden_act"] == config.hidden_act
    assert told["model_type"] == config.model_type
    assert told["msd"] == '{"positions": "plain"}' and config.options == DraftOptions(positions="plain")
    for key in SIZES:
        assert f"`{key}`" in section("What is read from config.json")
        with pytest.raises(UserError, match=f"lacks {key}"):
            DraftConfig.from_dict({name: size for name, size in SIZES.items() if name != key})


def test_renaming_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_draft(DraftModel(DraftConfig.from_dict(SIZES)), "theirs")
    ours = load_draft("theirs").state_dict()
    tensors = load_file("theirs/model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, "theirs/model.safetensors")
    with pytest.raises(UserError, match=r"missing embed_tokens\.weight"):
        load_draft("theirs")
    Path("draft").mkdir()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "porting.md", "exec"), {})
    shutil.copy("theirs/config.json", "draft/config.json")
    renamed = load_draft("draft").state_dict()
    assert set(renamed) == set(ours) and all(renamed[name].equal(tensor) for name, tensor in ours.items())


def test_a_head_of_several_layers_is_refused(tmp_path: Path) -> None:
    save_draft(DraftModel(DraftConfig.from_dict(SIZES)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    second = {
        name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in tensors.items() if "layers.0" in name
    }
    save_file({**tensors, **second}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected layers\.1"):
        load_draft(tmp_path)


def test_commands_parse() -> None:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"`(msd [^`]+)`", PAGE)
    commands = [line for line in [*lines, *inline] if " --" in line]
    assert len(commands) >= 5
    for line in commands:
        parser([shlex.split(line)[1]]).parse_args(shlex.split(line)[1:])

"""`msd doctor` on tiny checkpoints: names what is missing, damaged or does not fit; loads no weights."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_draft import make_draft
from tiny_eagle3 import make_eagle3
from tiny_llava import make_liuhaotian, make_llava_hf
from tiny_stock import make_llava_next, make_qwen
from tiny_vispec import make_vispec

from eagle.commands.doctor import run as run_doctor
from eagle.doctor import Check, State
from eagle.doctor.environment import Machine
from eagle.doctor.memory import POSITIONS, check_fit
from eagle.doctor.models import check_base, check_draft, check_engine, check_pair, footprint
from eagle.doctor.serving import check_served_draft
from eagle.drafts.config import DRAFT_VOCAB_FILE
from eagle.drafts.draft_vocab import write_draft_vocab
from eagle.families import load_target
from llava.errors import UserError

BASES: dict[str, Callable[[Path], Path]] = {
    "liuhaotian": make_liuhaotian,
    "liuhaotian, tower inside": lambda folder: make_liuhaotian(folder, tower="inside", old_buffers=True),
    "liuhaotian, safetensors": lambda folder: make_liuhaotian(folder, safetensors=True, shards=1),
    "llava-hf": lambda folder: make_llava_hf(folder, shards=3),
    "llava_next": make_llava_next,
    "qwen2_vl": make_qwen,
    "qwen2_vl tied": lambda folder: make_qwen(folder, tied=True),
    "qwen2_5_vl": lambda folder: make_qwen(folder, version="2.5"),
}


@pytest.fixture(scope="module", params=BASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = BASES[request.param](folder / "base")
    return base, make_draft(folder / "draft", load_target(base, dtype="float32"))


@pytest.fixture(scope="module")
def llava_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llava")
    base = make_liuhaotian(folder / "base", safetensors=True)
    return base, make_draft(folder / "draft", load_target(base, dtype="float32"))


def copy(source: Path, folder: Path) -> Path:
    """A copy that a test may damage, with its tower beside it."""
    for name in (source.name, "tiny-clip"):
        if (source.parent / name).is_dir():
            shutil.copytree(source.parent / name, folder / name)
    return folder / source.name


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def problems(checks: list[Check]) -> list[str]:
    return [f"{check.topic}: {check.found}" for check in checks if check.state is State.PROBLEM]


def test_a_good_pair_is_ok_and_no_weights_are_read(pair: tuple[Path, Path]) -> None:
    base, found = check_base(str(pair[0]), hub=False)
    draft, own = check_draft(str(pair[1]), hub=False)
    assert base is not None and draft is not None
    checks = [*found, *own, *check_pair(base, draft)]
    assert {check.state for check in checks} == {State.OK}, checks
    assert all(parameter.is_meta for model in (base.model, draft) for parameter in model.parameters())


def test_footprint_counts_what_is_loaded(llava_pair: tuple[Path, Path]) -> None:
    base, _ = check_base(str(llava_pair[0]), hub=False)
    draft, _ = check_draft(str(llava_pair[1]), hub=False)
    assert base is not None
    size = footprint(base, draft)
    target = load_target(llava_pair[0], dtype="float32")
    assert size.base == sum(p.numel() for p in target.model.parameters())
    assert size.draft == sum(tensor.numel() for tensor in load_file(llava_pair[1] / "model.safetensors").values())
    text = target.config.get_text_config()
    assert size.cache == 2 * 32 * (text.num_hidden_layers + 1)
    need = (size.base + size.draft + size.cache * POSITIONS) * 4
    assert check_fit("room", size, Machine("cpu", need)).found.startswith("fits in bfloat16 and float32")
    assert check_fit("room", size, Machine("cpu", need - 1)).found.startswith("fits in bfloat16:")
    assert check_fit("room", size, Machine("cpu", need - 1, slow_in_16_bit=True)).state is State.WARNING
    assert check_fit("room", size, Machine("cpu", 0)).found.startswith("fits in no dtype")


def change_weights(keep: Callable[[str], bool]) -> Callable[[Path], None]:
    """Drops tensors."""

    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            save_file({name: value for name, value in load_file(path).items() if keep(name)}, path)

    return change


def truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 4)


SPOILED_BASES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: shutil.rmtree(f), "base model not found"),
    (lambda f: (f / "config.json").unlink(), "base model config not found"),
    (lambda f: (f / "config.json").write_text("{"), "base model config is not valid JSON"),
    (lambda f: change_config(f, model_type="bert"), "model_type 'bert' is not supported"),
    (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "weight files missing"),
    (truncate, "weight file is damaged or truncated"),
    (change_weights(lambda name: "layers.1.mlp.up_proj" not in name), "tensors do not fit the model"),
    (lambda f: change_config(f, num_hidden_layers=3), "tensors do not fit the model"),
    (lambda f: change_config(f, vocab_size=400), "tensors do not fit the model"),
    (lambda f: change_config(f, mm_projector_type="linear"), "unsupported mm_projector_type 'linear'"),
    (lambda f: (f / "tokenizer.model").write_bytes(b"not a tokenizer"), "tokenizer cannot be"),
    (lambda f: shutil.rmtree(f.parent / "tiny-clip"), "vision tower not found"),
    (lambda f: (f.parent / "tiny-clip/model.safetensors").unlink(), "no weights"),
]
SPOILED_DRAFTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: shutil.rmtree(f), "draft not found"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (change_weights(lambda name: name != "fc.weight"), "missing fc.weight"),
    (lambda f: change_config(f, intermediate_size=128), "layers.0.mlp.gate_proj.weight is [64, 32], config.json says"),
    (lambda f: change_config(f, msd={"position": "plain"}), "unknown key 'position'"),
    (lambda f: (f / "config.json").write_text("{}"), "lacks hidden_size"),
    (lambda f: (f / "model.safetensors").write_bytes(b"short"), "weight file is damaged"),
    (lambda f: (f / DRAFT_VOCAB_FILE).unlink(), "trimmed vocabulary cannot be read"),
    (lambda f: (f / DRAFT_VOCAB_FILE).write_bytes(b"no"), "trimmed vocabulary cannot be read"),
]


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [("base model", *each) for each in SPOILED_BASES] + [("draft", *each) for each in SPOILED_DRAFTS],
)
def test_what_is_spoiled_is_a_problem(
    llava_pair: tuple[Path, Path], tmp_path: Path, kind: str, spoil: Callable[[Path], object], message: str
) -> None:
    folder = copy(llava_pair[0 if kind == "base model" else 1], tmp_path)
    if kind == "draft":
        write_draft_vocab(folder, torch.tensor([3, 4]))
    spoil(folder)
    model, (check,) = (check_base if kind == "base model" else check_draft)(str(folder), hub=False)
    assert model is None and check.state is State.PROBLEM and check.topic == kind
    assert message in check.found and check.fix


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 64}, "hidden size 64 in the draft, 32 in the base"),
        ({"vocab_size": 400}, "vocabulary 400 in the draft"),
        ({"model_type": "qwen2_vl"}, "family qwen2_vl in the draft, llava in the base"),
    ],
)
def test_a_draft_of_another_base(llava_pair: tuple[Path, Path], changes: dict[str, object], found: str) -> None:
    base, _ = check_base(str(llava_pair[0]), hub=False)
    draft, _ = check_draft(str(llava_pair[1]), hub=False)
    assert base is not None and draft is not None
    draft.config = replace(draft.config, **changes)
    (check,) = check_pair(base, draft)
    assert check.state is State.PROBLEM and found in check.found and check.fix


@pytest.mark.parametrize(("kind", "make"), [("EAGLE-3", make_eagle3), ("ViSpec", make_vispec)])
def test_heads_of_other_kinds(
    llava_pair: tuple[Path, Path], tmp_path: Path, kind: str, make: Callable[..., Path]
) -> None:
    base, _ = check_base(str(llava_pair[0]), hub=False)
    make(tmp_path, load_target(llava_pair[0], dtype="float32"))
    draft, checks = check_draft(str(tmp_path), hub=False)
    assert base is not None and draft is not None and draft.kind == kind
    assert all(parameter.is_meta for parameter in draft.parameters())
    assert {check.state for check in [*checks, *check_pair(base, draft)]} == {State.OK}, checks
    assert checks[1].found.startswith(f"{kind}: ")
    layers = base.config.get_text_config().num_hidden_layers
    assert footprint(base, draft).cache == footprint(base, None).cache + footprint(base, None).cache // layers
    assert check_served_draft(draft, "head").state is (State.OK if kind == "EAGLE-3" else State.WARNING)
    draft.config = replace(draft.config, **{"target_hidden_size" if kind == "EAGLE-3" else "hidden_size": 64})
    (check,) = check_pair(base, draft)
    assert check.state is State.PROBLEM and "hidden size" in check.found


def test_a_hub_name_without_the_hub_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for look in (check_base, check_draft):
        model, (check,) = look("tiny/nowhere", hub=False)
        assert model is None
        assert check.state is State.WARNING and "--hub" in check.fix


def test_a_base_without_a_chat_template_is_a_problem(tmp_path: Path) -> None:
    base = make_qwen(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    _, checks = check_base(str(base), hub=False)
    assert problems(checks) == ["chat template: the base model has no chat template"]


def test_the_engine_is_compared_on_request(
    llava_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    check = check_engine(str(llava_pair[0]), "cpu")
    assert check.state is State.OK and "torch.float32" in check.found
    assert len(list((tmp_path / "cache" / "self-checks").iterdir())) == 1
    base = copy(llava_pair[0], tmp_path / "copy")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "mm_vision_select_layer": -99}))
    check = check_engine(str(base), "cpu")
    assert check.state is State.PROBLEM and "cannot answer a short prompt" in check.found and str(base) in check.found
    with pytest.raises(UserError, match="--self-check without a base model"):
        run_doctor(Namespace(self_check=True, base_model=None))

"""`msd doctor` on tiny checkpoints: names what is missing, damaged or does not fit; loads no weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_draft import make_draft
from tiny_llava import make_liuhaotian, make_llava_hf
from tiny_stock import make_llava_next, make_qwen

from eagle.doctor import Check, State
from eagle.doctor.environment import Machine
from eagle.doctor.memory import POSITIONS, check_fit
from eagle.doctor.models import check_base, check_draft, check_pair, footprint
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.config import DRAFT_VOCAB_FILE, DraftConfig
from eagle.drafts.draft_vocab import write_draft_vocab
from eagle.drafts.msd import DraftModel
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


def test_a_good_pair_is_ok_and_nothing_is_loaded(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch.load

    def only_meta(path: Path, map_location: str, **options: bool) -> object:
        assert map_location == "meta"
        return load(path, map_location=map_location, **options)

    monkeypatch.setattr(torch, "load", only_meta)
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("loads weights"))
    base, found = check_base(str(pair[0]), hub=False)
    draft, own = check_draft(str(pair[1]), hub=False)
    assert base is not None and draft is not None
    checks = [*found, *own, *check_pair(base, draft)]
    assert {check.state for check in checks} == {State.OK}, checks


def test_footprint_counts_what_is_loaded(llava_pair: tuple[Path, Path]) -> None:
    base, _ = check_base(str(llava_pair[0]), hub=False)
    draft, _ = check_draft(str(llava_pair[1]), hub=False)
    assert base is not None
    size = footprint(base, draft)
    target = load_target(llava_pair[0], dtype="float32")
    tower = sum(p.numel() for p in target.model.model.vision_tower.parameters())
    assert size is not None
    assert size.base == sum(p.numel() for p in target.model.parameters()) - tower
    assert size.draft == sum(tensor.numel() for tensor in load_file(llava_pair[1] / "model.safetensors").values())
    text = target.config.get_text_config()
    assert size.cache == 2 * 32 * (text.num_hidden_layers + 1)
    need = (size.base + size.draft + size.cache * POSITIONS) * 4
    assert check_fit("room", size, Machine("cpu", need)).found.startswith("fits in bfloat16 and float32")
    assert check_fit("room", size, Machine("cpu", need - 1)).found.startswith("fits in bfloat16:")
    assert check_fit("room", size, Machine("cpu", need - 1, slow_in_16_bit=True)).state is State.WARNING
    assert check_fit("room", size, Machine("cpu", 0)).found.startswith("fits in no dtype")


def spoil_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 4)


def drop_tensors(*names: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            save_file({name: value for name, value in load_file(path).items() if name not in names}, path)

    return drop


SPOILED_BASES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: shutil.rmtree(f), "base model: base model not found"),
    (lambda f: (f / "config.json").unlink(), "base model: base model config not found"),
    (lambda f: (f / "config.json").write_text("{"), "base model: base model config is not valid JSON"),
    (lambda f: change_config(f, model_type="bert"), "base model: model_type 'bert' is not supported"),
    (spoil_shard, "base model: weight files missing"),
    (truncate, "base model: weight file is damaged or truncated"),
    (drop_tensors("model.layers.1.mlp.up_proj.weight"), "missing tensors: model.layers.1.mlp.up_proj.weight"),
    (drop_tensors("model.norm.weight", "lm_head.weight"), "missing tensors: model.norm.weight, lm_head.weight"),
    (drop_tensors("model.embed_tokens.weight"), "missing tensors: token embedding"),
    (lambda f: change_config(f, num_hidden_layers=3), "missing tensors: model.layers.2.input_layernorm.weight"),
    (lambda f: change_config(f, mm_projector_type="linear"), "base model: unsupported mm_projector_type 'linear'"),
    (lambda f: shutil.rmtree(f.parent / "tiny-clip"), "vision tower: vision tower not found"),
    (lambda f: (f.parent / "tiny-clip/model.safetensors").unlink(), "base model: no weights"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED_BASES, ids=[message[:40] for _, message in SPOILED_BASES])
def test_a_spoiled_base_is_a_problem(
    llava_pair: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    base = copy(llava_pair[0], tmp_path)
    spoil(base)
    _, checks = check_base(str(base), hub=False)
    assert len(problems(checks)) == 1
    assert message in problems(checks)[0]
    assert all(check.fix for check in checks if check.state is State.PROBLEM)


SPOILED_DRAFTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: shutil.rmtree(f), "draft not found"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (
        drop_tensors("layers.0.mlp.up_proj.weight", "fc.weight"),
        "missing fc.weight, missing layers.0.mlp.up_proj.weight",
    ),
    (lambda f: change_config(f, intermediate_size=128), "layers.0.mlp.gate_proj.weight is [64, 32], config.json says"),
    (lambda f: change_config(f, msd={"position": "plain"}), "unknown key 'position'"),
    (lambda f: (f / "config.json").write_text("{}"), "lacks hidden_size"),
    (lambda f: (f / "model.safetensors").write_bytes(b"short"), "weight file is damaged"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED_DRAFTS, ids=[message[:40] for _, message in SPOILED_DRAFTS])
def test_a_spoiled_draft_is_a_problem(
    llava_pair: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    draft = copy(llava_pair[1], tmp_path)
    spoil(draft)
    _, checks = check_draft(str(draft), hub=False)
    assert [message in problem for problem in problems(checks)] == [True], checks


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 64}, "hidden size 64 in the draft, 32 in the base"),
        ({"vocab_size": 400}, "vocabulary 400 in the draft"),
        ({"model_type": "qwen2_vl"}, "base is llava, draft was made for qwen2_vl"),
    ],
)
def test_a_draft_of_another_base(
    llava_pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], found: str
) -> None:
    base, _ = check_base(str(llava_pair[0]), hub=False)
    assert base is not None
    if "vocab_size" in changes:
        fields = load_draft(llava_pair[1]).config.to_dict()
        save_draft(DraftModel(DraftConfig.from_dict({**fields, **changes})), tmp_path / "draft")
    else:
        make_draft(tmp_path / "draft", load_target(llava_pair[0], dtype="float32"), **changes)
    draft, own = check_draft(str(tmp_path / "draft"), hub=False)
    assert draft is not None and not problems(own)
    (check,) = check_pair(base, draft)
    assert found in check.found and check.fix
    assert check.state is State.PROBLEM


def test_a_hub_name_without_the_hub_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for look in (check_base, check_draft):
        contents, (check,) = look("tiny/nowhere", hub=False)
        assert contents is None
        assert check.state is State.WARNING and "--hub" in check.fix


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"no")])
def test_a_trimmed_vocabulary_that_cannot_be_loaded(
    llava_pair: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    draft = copy(llava_pair[1], tmp_path)
    write_draft_vocab(draft, torch.tensor([3, 4]))
    assert {check.state for check in check_draft(str(draft), hub=False)[1]} == {State.OK}
    spoil(draft / DRAFT_VOCAB_FILE)
    (check,) = check_draft(str(draft), hub=False)[1]
    assert check.state is State.PROBLEM and "eagle.ge_data.vocabulary" in check.fix
    with pytest.raises(UserError):
        load_draft(draft)


def test_a_tokenizer_that_does_not_load_is_a_problem(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(pair[0], tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        if (base / name).exists():
            (base / name).write_bytes(b"not a tokenizer")
    found = problems(check_base(str(base), False)[1])
    assert len(found) == 1 and found[0].startswith("tokenizer: ") and "cannot be" in found[0]

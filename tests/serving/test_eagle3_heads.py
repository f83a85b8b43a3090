"""EAGLE-3 heads that were trained here, in vLLM's own class: its counters of accepted tokens are those of our chain."""

from __future__ import annotations

import json
import random
import string
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from serving_support import MAKERS, POCKET, TOKENS, Pair, Run, load_msd, make_questions
from tiny_llava import make_image

from eagle.doctor import State
from eagle.doctor.served_eagle3 import check_served_eagle3
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import IDS
from eagle.families.draft_config import eagle3_config_of
from eagle.questions import Question
from eagle.serving.eagle3_export import Layout, export_eagle3
from eagle.train import main_deepspeed
from llava.errors import run_cli
from llava.export import export_pretrained

pytestmark = pytest.mark.by_hand


def train(base: Path, folder: Path, data: dict[str, Path | str], settings: dict[str, Any], **config: Any) -> Path:
    """A head that the training command made beside its base.

    Args:
        folder: for the configs and the checkpoints.
        data: flags of the annotation files and pictures.
        settings: of section "train".
        config: fields of the head's config.json.
    """
    section = {"text_share": 0, "image_start": 1, "validation_share": 0.1, "log_every": 20, **settings}
    (folder / "draft.json").write_text(json.dumps({**eagle3_config_of(base).published, **config, "train": section}))
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    (folder / "ds.json").write_text(json.dumps(sizes))
    command = ["main_deepspeed.py", "--basepath", base, "--cpdir", folder / "ckpt", "--config", folder / "draft.json"]
    command += ["--deepspeed_config", folder / "ds.json", "--tracker", "none", "--online", "--dtype", "float32"]
    command += [word for flag, value in data.items() for word in (f"--{flag}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in command])
        assert run_cli(main_deepspeed.main) == 0
    return folder / "ckpt" / "final"


def wrong(pair: Pair, runner: str) -> set[str]:
    """What `msd doctor --served-by vllm` says that vLLM does otherwise."""
    assert isinstance(pair.msd.draft, Eagle3Draft)
    checks = check_served_eagle3(pair.msd.draft, pair.msd.target, runner)
    assert all(check.state in (State.OK, State.PROBLEM) for check in checks)
    return {check.topic.removeprefix("vLLM: ") for check in checks if check.state is State.PROBLEM}


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A head of the pocket LLaVA with a trimmed vocabulary, and the base as vLLM loads it."""
    folder, base = tmp_path_factory.mktemp("pocket"), POCKET / "llava"
    data: dict[str, Path | str] = {f"annotations_{kind}": POCKET / "data" / f"train_{kind}.json" for kind in "tv"}
    data |= {"image-folder": POCKET / "data", "limit": "120"}
    settings = {"epochs": 3, "learning_rate": 2e-3, "rollout_steps": 4}
    return train(base, folder, data, settings, draft_vocab_size=1000), export_pretrained(base, folder / "base")


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_a_trained_head_drafts_as_in_our_loop(
    pocket: tuple[Path, Path], layout: Layout, questions: list[Question], run_engine: Run, tmp_path: Path
) -> None:
    head, model = pocket
    base = POCKET / "llava"
    pair = Pair(base, head, model, export_eagle3(head, tmp_path / "out", layout, base), load_msd(base, head))
    picked = [questions[number] for number in (0, 15, 1, 31, 2, 3, 4, 5)]  # 15 and 31 have no picture
    ours = pair.answers(picked)
    found = run_engine(pair, [pair.request(each) for each in picked], method="eagle3")
    print(layout, ours.drafts, ours.accepted, found["counters"])
    assert found["counters"]["num_accepted_tokens_per_pos"] == ours.accepted
    assert found["counters"]["num_drafts"] == ours.drafts
    assert found["ids"] == ours.ids
    assert ours.drafts > ours.accepted[0] > ours.accepted[-1] > 0
    assert not wrong(pair, "V1")


def make_data(folder: Path) -> dict[str, Path | str]:
    """Conversations of random characters, without and with a picture."""
    letters = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {"t": [], "v": []}
    for number in range(60):
        make_image(folder / f"train{number % 5}.png", 40 + 9 * (number % 5), 60, seed=number % 5)
        for kind, begin in (("t", ""), ("v", "<image>\n")):
            said = ["".join(letters.choices(string.printable, k=60)) for _ in range(2)]
            turns = [{"from": "human", "value": begin + said[0]}, {"from": "gpt", "value": said[1]}]
            picture = {"image": f"train{number % 5}.png"} if kind == "v" else {}
            rows[kind].append({"id": f"{kind}{number}", "conversations": turns, **picture})
    for kind, conversations in rows.items():
        (folder / f"{kind}.json").write_text(json.dumps(conversations))
    return {"annotations_t": folder / "t.json", "annotations_v": folder / "v.json", "image-folder": folder}


def sharpen(base: Path) -> None:
    """The base is sure of its next token: with random weights alone its distribution is almost uniform."""
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] *= 40
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_heads_of_bases_with_mrope_differ_behind_pictures_by_the_places_of_rows_alone(
    family: str, run_engine: Run, tmp_path: Path
) -> None:
    """The V1 runner overwrites rows of the prompt behind a picture. Where it does not, all counters are ours."""
    base = MAKERS[family](tmp_path / "base")
    sharpen(base)
    settings = {"epochs": 20, "learning_rate": 4e-3, "rollout_steps": 5}
    head = train(base, tmp_path, make_data(tmp_path), settings)
    pair = Pair(base, head, base, export_eagle3(head, tmp_path / "out", "flat", base), load_msd(base, head))
    assert pair.msd.draft.positions == "mrope"
    asked = make_questions(tmp_path)
    pictures = [each for each in asked if each.images]
    texts = [Question(f"text {number}", each.question) for number, each in enumerate(asked)]
    for name, picked, own_places in (("text", texts, False), ("stock", pictures, False), ("own", pictures, True)):
        ours = pair.answers(picked)
        requests = [pair.request(each) for each in picked]
        found = run_engine(pair, requests, method="eagle3", max_model_len=512, own_places=own_places)
        counters = found["counters"]
        print(family, name, ours.drafts, ours.accepted, counters)
        assert found["ids"] == ours.ids and any(len(ids) == TOKENS for ids in ours.ids)
        assert ours.drafts > ours.accepted[0] > ours.accepted[1] > 0
        if name == "stock":
            assert counters["num_accepted_tokens"] < sum(ours.accepted)
        else:
            assert counters["num_accepted_tokens_per_pos"] == ours.accepted
            assert counters["num_drafts"] == ours.drafts
    assert wrong(pair, "V1") == {"cached rows"}
    assert wrong(pair, "V2") == {"positions"}


def test_other_layers_are_seen_by_the_counters_and_by_doctor(
    pocket: tuple[Path, Path], questions: list[Question], run_engine: Run, tmp_path: Path
) -> None:
    """vLLM reads the layers that the exported config names. With others fewer tokens are accepted, without an error."""
    head, model = pocket
    base = POCKET / "llava"
    out = export_eagle3(head, tmp_path / "out", "flat", base)
    config = json.loads((out / "config.json").read_text())
    assert config[IDS] == [2, 8, 13]
    (out / "config.json").write_text(json.dumps({**config, IDS: [0, 1, 2]}))
    pair = Pair(base, out, model, out, load_msd(base, out))  # ours reads section "msd", where they are right
    ours = pair.answers(questions[:4])
    found = run_engine(pair, [pair.request(each) for each in questions[:4]], method="eagle3")
    print(ours.drafts, ours.accepted, found["counters"])
    assert found["ids"] == ours.ids
    assert found["counters"]["num_accepted_tokens"] < sum(ours.accepted)
    assert wrong(pair, "V1") == {"layers"}
